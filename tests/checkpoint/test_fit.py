"""What a network takes of the weights of one that differs from it."""

import pytest

from dtr_scale.checkpoint.fit import Rows, fit
from dtr_scale.errors import ConfigError
from tests.support.weights import ADM, CONFIG, random_network

TABLE, LABELS = "y_embedder.embedding_table.weight", "label_emb.weight"


def shapes(config, **changed):
    network = random_network(config | changed)
    return {name: tuple(value.shape) for name, value in network.state_dict().items()}


def fitted(source, target, *, had=True, has=True, unconditional=False):
    return fit(
        source, target, source_has_null=had, target_has_null=has, is_unconditional=unconditional
    )


def test_the_same_network_is_taken_whole():
    found = fitted(shapes(CONFIG), shapes(CONFIG))
    assert found.is_exact and found.share == 1
    assert found.lines() == [found.lines()[0]] and "100.0% of the parameters" in found.lines()[0]


@pytest.mark.parametrize("changed", [{"input_size": 16}, {"routing": {"type": "dtr"}}])
def test_positions_and_windows_are_made_anew(changed):
    assert fitted(shapes(CONFIG), shapes(CONFIG, **changed)).is_exact


def test_other_classes_begin_afresh_beside_the_row_of_none():
    found = fitted(shapes(CONFIG), shapes(CONFIG, num_classes=2))
    assert (found.fresh, found.left) == ((TABLE,), ())
    assert found.taken[TABLE] == Rows(10 * 64, 2 * 64, 64)
    assert f"taken of {TABLE}: the row of no class, 64 numbers" in found.lines()
    assert f"begun afresh: {TABLE}" in found.lines()
    adm = fitted(
        shapes(ADM, class_dropout_prob=0.1), shapes(ADM, class_dropout_prob=0.1, num_classes=2)
    )
    assert adm.taken[LABELS] == Rows(5 * 128, 2 * 128, 128)


def test_no_class_is_what_an_unconditional_network_begins_with():
    found = fitted(
        shapes(CONFIG), shapes(CONFIG, conditioning="none"), has=False, unconditional=True
    )
    assert found.is_exact and found.taken[TABLE] == Rows(10 * 64, 0, 64)
    adm = fitted(shapes(ADM), shapes(ADM, conditioning="none"), had=False, has=False,
                 unconditional=True)  # fmt: skip
    assert (adm.fresh, adm.left) == ((), (LABELS,))
    assert f"left: {LABELS}" in adm.lines()


def test_a_row_of_none_is_no_class():
    """Ten classes and none, and eleven classes, have tables of one shape."""
    eleven = shapes(CONFIG, num_classes=11, class_dropout_prob=0.0)
    assert eleven[TABLE] == shapes(CONFIG)[TABLE]
    found = fitted(shapes(CONFIG), eleven, has=False)
    assert found.fresh == (TABLE,) and TABLE not in found.taken


def test_drawn_masks_are_taken_left_or_drawn():
    drawn, plain = shapes(CONFIG, routing={"type": "random"}), shapes(CONFIG)
    masks = tuple(f"routing.mask_{block}" for block in range(3))
    assert fitted(drawn, drawn).is_exact
    assert fitted(drawn, plain).left == masks
    found = fitted(plain, drawn)
    assert (found.fresh, found.share) == (masks, 1)
    assert "begun afresh: routing.mask_0, routing.mask_1, routing.mask_2" in found.lines()


def test_another_kind_of_network_is_refused():
    for other in (shapes(CONFIG, hidden_size=32), shapes(ADM)):
        with pytest.raises(ConfigError, match=r"\d% of its parameters would be taken"):
            fitted(shapes(CONFIG), other)
    deeper = fitted(shapes(CONFIG), shapes(CONFIG, depth=4, patch_size=4))
    assert any("begun afresh: x_embedder.proj.weight, blocks.*." in line for line in deeper.lines())
