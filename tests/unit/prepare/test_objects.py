"""From and to an object store: moto's S3 server is the store."""

import json
import zipfile

import pytest
from megatron.energon import WorkerConfig, get_train_dataset

from tests.unit.data.samples import convert_folder, entry, write_annotations, write_pretrain
from tests.unit.prepare.shards import shards

# How training is pointed at a store.
BLEND = """\
__module__: megatron.energon
__class__: MetadatasetV2
splits:
  train:
    path: msc://_s3-data/some/wds
"""
boto3 = pytest.importorskip("boto3")
server = pytest.importorskip("moto.server")


@pytest.fixture(scope="module")
def store():
    """A server; its address and keys are in the environment. One for all: the client keeps its connections."""
    with pytest.MonkeyPatch.context() as patch:
        running = server.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
        running.start()
        host, port = running.get_host_and_port()
        patch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            patch.setenv(name, "testing")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        yield
        running.stop()


@pytest.fixture
def bucket(store):
    """The bucket `data`, empty."""
    bucket = boto3.resource("s3").create_bucket(Bucket="data")
    bucket.objects.all().delete()
    return bucket


def objects(bucket):
    return {item.key: item.get()["Body"].read() for item in bucket.objects.all()}


def test_shards_in_a_store_are_those_of_a_folder(bucket, tmp_path):
    entries = write_pretrain(tmp_path, 30)
    entries[7]["image"] = "nowhere.jpg"
    write_annotations(tmp_path, entries)
    settings = {"max_rejected_share": 0.1, "workers": 2}
    convert_folder(tmp_path, **settings)
    for part in (1, 2):
        convert_folder(tmp_path, output="s3://data/some/wds", part=f"{part}/2", **settings)
    assert "some/wds/manifest.json" not in objects(bucket)
    bucket.Object("some/wds/00003.tar").put(Body=b"cut off")
    report = convert_folder(tmp_path, output="s3://data/some/wds", **settings)
    assert (report.given, report.written, len(report.rejected)) == (30, 29, 1)
    found = objects(bucket)
    assert {name: found[f"some/wds/{name}"] for name in shards(tmp_path)} == shards(tmp_path)
    assert found["some/wds.rejected.tsv"] == (tmp_path / "wds.rejected.tsv").read_bytes()
    for name in ("manifest.json", ".nv-meta/dataset.yaml", ".nv-meta/split.yaml", ".nv-meta/.info.json"):
        assert found[f"some/wds/{name}"] == (tmp_path / "wds" / name).read_bytes()
    assert not [name for name in found if ".records" in name or ".tmp" in name]
    blend = tmp_path / "blend.yaml"
    blend.write_text(BLEND)
    dataset = get_train_dataset(
        blend,
        worker_config=WorkerConfig(rank=0, world_size=1, num_workers=0),
        batch_size=None,
        shuffle_buffer_size=None,
        max_samples_per_sequence=None,
        repeat=False,
    )
    assert len(dataset) == 26
    with pytest.raises(ValueError, match="s3://data/some/wds: exists; remove it"):
        convert_folder(tmp_path, output="s3://data/some/wds", **settings)
    with pytest.raises(ValueError, match="--overwrite removes nothing from an object store"):
        convert_folder(tmp_path, output="s3://data/some/wds", overwrite=True, **settings)


def test_json_and_pictures_from_a_store(bucket, tmp_path):
    entries = write_pretrain(tmp_path, 20)
    (tmp_path / "more").mkdir()
    for sample in entries[:10]:
        (tmp_path / sample["image"]).rename(tmp_path / "more" / sample["image"].rpartition("/")[2])
        sample["image"] = sample["image"].rpartition("/")[2]
    entries.append({**entry(3), "id": "out", "image": "../LLaVA/00000/000012.jpg"})
    write_annotations(tmp_path, entries)
    with zipfile.ZipFile(tmp_path / "more.zip", "w") as archive:
        for path in (tmp_path / "more").iterdir():
            archive.write(path, path.name)
    for path in tmp_path.rglob("*"):
        if path.is_file() and path.parent.name != "more":
            bucket.upload_file(str(path), f"LLaVA/{path.relative_to(tmp_path)}")
    settings = {"no_prepare": True, "max_rejected_share": 0.1}
    report = convert_folder(
        "s3://data/LLaVA", images="s3://data/LLaVA/more.zip,s3://data/LLaVA", output=str(tmp_path / "wds"), **settings
    )
    assert (report.written, report.rejected[0][1]) == (20, '"out"')
    assert "leads out of the folder" in report.rejected[0][2]
    here = convert_folder(tmp_path, images=f"{tmp_path}/more.zip,{tmp_path}", output=str(tmp_path / "b"), **settings)
    assert here.records == report.records


def test_a_store_that_fails_ends_the_run(bucket, tmp_path, monkeypatch):
    """What is wrong with a name alone does not."""
    entries = write_pretrain(tmp_path, 20)
    bucket.put_object(Key="x/a.jpg", Body=(tmp_path / entries[0]["image"]).read_bytes())
    for sample, name in zip(entries, ["k" * 1025, "a\0.jpg", "nowhere.jpg"] + ["a.jpg"] * 17, strict=True):
        sample["image"] = name
    write_annotations(tmp_path, entries)
    settings = {"images": "s3://data/x", "dry_run": True, "max_rejected_share": 0.5}
    assert [line[2].partition(": ")[2] for line in convert_folder(tmp_path, **settings).rejected] == [
        "not a name in a store",
        "not a name in a store",
        "missing",
    ]

    def fail(url):
        raise RuntimeError("connection refused")

    monkeypatch.setattr("multistorageclient.resolve_storage_client", fail)
    with pytest.raises(OSError, match="s3://data/x: connection refused"):
        convert_folder(tmp_path, **settings)


def test_what_a_store_does_not_have(bucket, tmp_path):
    write_pretrain(tmp_path, 10)
    with pytest.raises(ValueError, match=r"s3://data/x/blip_laion_cc_sbu_558k\.json: missing; say which"):
        convert_folder("s3://data/x")
    with pytest.raises(ValueError, match=r"s3://data/none\.zip: missing"):
        convert_folder(tmp_path, images="s3://data/none.zip")
    with pytest.raises(OSError, match="nowhere://data"):
        convert_folder(tmp_path, output="nowhere://data/wds")
    assert json.loads(json.dumps(objects(bucket))) == {}
