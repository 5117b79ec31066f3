"""Which layers lie where, with megatron.core as the judge."""

from __future__ import annotations

import pytest
from megatron.core.transformer.transformer_block import get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset

from megatron_patch.families.stages import pipeline_stages, stage_lengths

LAYER = "language_model.decoder.layers."


@pytest.mark.parametrize(
    ("num_layers", "pp_size", "num_chunks", "first", "last"),
    [
        (8, 2, 1, None, None),
        (8, 4, 2, None, None),
        (12, 2, 3, None, None),
        (7, 4, 1, 1, None),
        (10, 4, 1, 2, 4),
        (5, 2, 1, 2, 3),
        (5, 2, 1, None, 3),
        (16, 4, 2, 2, 6),
        (14, 3, 2, 6, None),
    ],
)
def test_stages_are_megatron_cores(num_layers, pp_size, num_chunks, first, last):
    config = TransformerConfig(
        num_layers=num_layers,
        hidden_size=8,
        num_attention_heads=1,
        pipeline_model_parallel_size=pp_size,
        virtual_pipeline_model_parallel_size=num_chunks if num_chunks > 1 else None,
        num_layers_in_first_pipeline_stage=first,
        num_layers_in_last_pipeline_stage=last,
        pipeline_dtype="not used",
    )
    stages = pipeline_stages(stage_lengths(num_layers, pp_size, first, last), num_chunks)
    for rank, chunks in enumerate(stages):
        for number, stage in enumerate(chunks):
            vp_stage = number if num_chunks > 1 else None
            start = get_transformer_layer_offset(config, vp_stage, rank)
            assert stage.layers == range(start, start + get_num_layers_to_build(config, vp_stage, rank))
    ends = [(stage.pre_process, stage.post_process) for chunks in stages for stage in chunks]
    assert ends == [(n == 0, n == len(ends) - 1) for n in range(len(ends))]


def test_names_within_a_stage():
    first, second = (stage for chunks in pipeline_stages([2, 2]) for stage in chunks)
    assert second.local_name(LAYER + "3.mlp.linear_fc2.weight") == LAYER + "1.mlp.linear_fc2.weight"
    assert first.local_name(LAYER + "3.mlp.linear_fc2.weight") is None
    assert second.local_name("vision_model.decoder.layers.1.mlp.linear_fc2.weight") is None
    for name, owner in {
        "vision_projection.encoder.linear_fc1.weight": first,
        "language_model.embedding.word_embeddings.weight": first,
        "language_model.decoder.final_layernorm.weight": second,
        "language_model.output_layer.weight": second,
    }.items():
        assert [stage.local_name(name) for stage in (first, second)] == [
            name if stage is owner else None for stage in (first, second)
        ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((4, 3), "4 layers: not a multiple of 3 pipeline stages"),
        ((4, 2, 4), "--decoder-first-pipeline-num-layers 4: of 4 layers 0 are left for 1 of 2 pipeline stages"),
        (
            (8, 4, 1, 2),
            "--decoder-first-pipeline-num-layers 1 and --decoder-last-pipeline-num-layers 2: of 8 layers 5 ",
        ),
        ((4, 2, 1, 1), "of 4 layers 2 are left for 0 of 2 pipeline stages; give numbers that leave each of these"),
        ((4, 1, 3, None), "of 4 layers 1 are left for 0 of 1 pipeline stages"),
        ((4, 2, None, 0), "--decoder-last-pipeline-num-layers 0"),
    ],
)
def test_cuts_that_the_model_has_not(arguments, message):
    with pytest.raises(ValueError, match=message):
        stage_lengths(*arguments)


def test_virtual_stages_that_do_not_share_a_stage():
    with pytest.raises(ValueError, match="-size 2: a stage has 3 layers, which 2 does not divide; use 1 or 3"):
        pipeline_stages([1, 3][1:], 2)
