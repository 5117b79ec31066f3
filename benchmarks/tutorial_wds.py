"""The tutorial's way from LLaVA-Pretrain to tar shards, as Pai-Megatron-Patch published it, to measure against.

python benchmarks/tutorial_wds.py FOLDER OUTPUT
"""

from __future__ import annotations

import json
import os
import sys

import webdataset
from tqdm import tqdm


def main() -> None:
    folder, output = sys.argv[1:]
    os.makedirs(output)
    with open(os.path.join(folder, "blip_laion_cc_sbu_558k.json")) as file:
        data = json.load(file)
    with webdataset.ShardWriter(os.path.join(output, "pretrain-%d.tar"), maxcount=10000) as writer:
        for entry in tqdm(data):
            with open(os.path.join(folder, entry["image"]), "rb") as file:
                image = file.read()
            text = json.dumps(entry["conversations"]).encode("utf-8")
            writer.write({"__key__": entry["id"], "jpg": image, "json": text})


if __name__ == "__main__":
    main()
