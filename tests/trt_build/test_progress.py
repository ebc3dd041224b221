from __future__ import annotations

from trt_build.progress import PhaseTree


def test_nested_phases_become_one_growing_fraction() -> None:
    tree = PhaseTree()
    seen = []
    tree.start("Building engine", None, 2)
    for half in range(2):
        tree.start("Inner", "Building engine", 4)
        for step in range(4):
            tree.step("Inner", step)
            seen.append(tree.fraction)
        tree.finish("Inner")
        tree.step("Building engine", half)
        seen.append(tree.fraction)
    tree.finish("Building engine")
    assert seen == sorted(seen)
    assert 0 < seen[0] < 0.05
    assert tree.fraction == 1.0


def test_the_innermost_phase_is_named_in_words() -> None:
    tree = PhaseTree()
    tree.start("Building engine", None, 6)
    tree.start("Optimizing graph", "Building engine", 3)
    assert tree.phase == "optimizing graph"
    tree.finish("Optimizing graph")
    tree.start("Determining refit engines", "Building engine", 1)
    assert tree.phase == "compiling kernels"
    tree.finish("Determining refit engines")
    assert tree.phase == "writing the engine"


def test_a_phase_that_never_started_is_ignored() -> None:
    tree = PhaseTree()
    tree.step("Unknown", 3)
    tree.finish("Unknown")
    assert (tree.fraction, tree.phase) == (0.0, "")
