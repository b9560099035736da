from pathlib import Path

import numpy as np
import torch

from dtr_scale.models.embedders import (
    LabelEmbedder,
    PatchEmbed,
    TimestepEmbedder,
    sincos_position_table,
    timestep_embedding,
)

GOLDEN = np.load(Path(__file__).parents[1] / "golden" / "dtr_dit_forward.npz")


def test_positions_equal_the_released_code():
    table = sincos_position_table(hidden_size=64, grid_size=4)
    np.testing.assert_allclose(table, GOLDEN["w.pos_embed"][0], rtol=0, atol=1e-6)


def test_timestep_embedding_is_cosines_then_sines_from_fast_to_slow():
    t = torch.tensor([0, 1, 999])
    embedding = timestep_embedding(t, 256)
    assert embedding.dtype == torch.float32
    torch.testing.assert_close(embedding[:, 0], torch.cos(t.float()))
    torch.testing.assert_close(embedding[:, 128], torch.sin(t.float()))
    slowest = 10_000 ** (-127 / 128)
    torch.testing.assert_close(embedding[2, 255], torch.tensor(999 * slowest).sin())


def test_timesteps_stay_apart_in_bfloat16():
    embedder = TimestepEmbedder(16).bfloat16()
    embedding = embedder(torch.tensor([998, 999]))
    assert embedding.dtype == torch.bfloat16
    assert not torch.equal(embedding[0], embedding[1])


def test_patches_run_row_by_row():
    embed = PatchEmbed(patch_size=2, in_channels=1, hidden_size=4)
    torch.nn.init.constant_(embed.proj.weight, 0.25)
    embed.proj.bias = None
    x = torch.tensor([[1.0, 2.0], [3.0, 4.0]]).kron(torch.ones(2, 2))[None, None]
    assert embed(x)[0, :, 0].tolist() == [1.0, 2.0, 3.0, 4.0]


def test_the_label_table_has_a_null_row_only_with_dropout():
    assert LabelEmbedder(10, 8, class_dropout_prob=0.1).embedding_table.num_embeddings == 11
    assert LabelEmbedder(10, 8, class_dropout_prob=0.0).embedding_table.num_embeddings == 10
