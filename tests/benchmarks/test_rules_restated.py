"""The rules against a second statement of them, plain and in upstream's number types, on many small cases chosen to sit on the edges.

Boxes lie on a coarse grid and scores on a few values near the thresholds, so that ties, equal offsets and exact limits are common.
"""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from diffalign.benchmarks.dpg.questions import image_score
from diffalign.benchmarks.geneval.results import score, summary
from diffalign.benchmarks.t2i_compbench.detections import Labelled
from diffalign.benchmarks.t2i_compbench.numeracy import score as numeracy_score
from diffalign.benchmarks.t2i_compbench.spatial import DIRECTIONS, position_2d, score_2d
from diffalign.rules import COLORS, RELATIONS, Detection, Limits, iou, judge, relative_position

CLASSES = ("dog", "cat", "cup")
EDGE_SCORES = [0.29, float(np.float32(0.3)), 0.31, 0.5, 0.89, 0.9, 0.91, 1.0]


# --- GenEval, as its evaluator computes it: float32 arrays, sorting by argsort, sets ----------------------------------------------


def plain_position(a, b, threshold):
    boxes = np.array([a, b], dtype=np.float32).reshape(2, 2, 2)
    centre_a, centre_b = boxes.mean(axis=1)
    size_a, size_b = np.abs(boxes[:, 1] - boxes[:, 0])
    offset = centre_a - centre_b
    revised = np.maximum(np.abs(offset) - threshold * (size_a + size_b), 0) * np.sign(offset)
    if np.all(np.abs(revised) < 1e-3):
        return set()
    dx, dy = revised / np.linalg.norm(offset)
    return {name for name, holds in zip(RELATIONS, (dx < -0.5, dx > 0.5, dy < -0.5, dy > 0.5), strict=True) if holds}


def plain_iou(a, b):
    def area(box):
        return max(box[2] - box[0] + 1, 0) * max(box[3] - box[1] + 1, 0)

    shared = area((max(a[0], b[0]), max(a[1], b[1]), min(a[2], b[2]), min(a[3], b[3])))
    union = area(a) + area(b) - shared
    return shared / union if union else 0


def plain_keep(found, tag, limits):
    scores = np.array([d.score for d in found], dtype=np.float32)
    threshold = limits.counting_threshold if tag == "counting" else limits.threshold
    order = [i for i in np.argsort(-scores, kind="stable") if scores[i] > np.float32(threshold)][: limits.max_objects]
    kept = []
    while order:
        best = order.pop(0)
        kept.append(found[best])
        order = [i for i in order if limits.max_overlap == 1 or plain_iou(found[best].box, found[i].box) < limits.max_overlap]
    return kept


def plain_verdict(row, detections, limits):
    """Correct, and the reasons with the relations found as sets."""
    objects = {name: kept for name, found in detections.items() if (kept := plain_keep(found, row["tag"], limits))}
    reasons, groups = [], []
    for clause in row.get("include", []):
        found = objects.get(clause["class"], [])[: clause["count"]]
        matched = len(found) >= clause["count"]
        if not matched:
            reasons.append(f"expected {clause['class']}>={clause['count']}, found {len(found)}")
        elif "color" in clause:
            colors = [d.mask for d in found]
            if colors.count(clause["color"]) < clause["count"]:
                matched = False
                told = ", ".join(f"{colors.count(c)} {c}" for c in COLORS if c in colors)
                right = colors.count(clause["color"])
                reasons.append(
                    f"expected {clause['color']} {clause['class']}>={clause['count']}, found {right} {clause['color']}; and {told}"
                )
        if "position" in clause and matched:
            relation, target = clause["position"]
            if groups[target] is None:
                matched = False
                reasons.append(f"no target for {clause['class']} to be {relation}")
            else:
                for a, b in itertools.product(found, groups[target]):
                    held = plain_position(a.box, b.box, limits.position_threshold)
                    if relation not in held:
                        matched = False
                        told = " and ".join(name for name in RELATIONS if name in held)
                        reasons.append(f"expected {clause['class']} {relation} target, found {told} target")
                        break
        groups.append(found if matched else None)
    for clause in row.get("exclude", []):
        if len(objects.get(clause["class"], [])) >= clause["count"]:
            reasons.append(f"expected {clause['class']}<{clause['count']}, found {len(objects[clause['class']])}")
    return not reasons, "\n".join(reasons)


def random_case(rng):
    def box():
        x, y = rng.integers(0, 12, 2) * 5
        return (float(x), float(y), float(x + 5 * rng.integers(1, 8)), float(y + 5 * rng.integers(1, 8)))

    # No two of a class share a score: how ties fall is left open upstream.
    detections = {
        name: [
            Detection(box(), s, mask=COLORS[rng.integers(3)])
            for s in rng.choice(EDGE_SCORES, rng.integers(0, 6), replace=False).tolist() + rng.uniform(0.3, 1, rng.integers(0, 3)).tolist()
        ]
        for name in CLASSES
        if rng.random() < 0.8
    }
    include = []
    for i in range(rng.integers(1, 4)):
        clause = {"class": CLASSES[rng.integers(3)], "count": int(rng.integers(1, 4))}
        if rng.random() < 0.4:
            clause["color"] = COLORS[rng.integers(3)]
        if i and rng.random() < 0.6:
            clause["position"] = [RELATIONS[rng.integers(4)], int(rng.integers(i))]
        include.append(clause)
    row = {"tag": ("counting", "position", "colors")[rng.integers(3)], "include": include}
    if rng.random() < 0.4:
        row["exclude"] = [{"class": CLASSES[rng.integers(3)], "count": int(rng.integers(1, 5))}]
    limits = Limits(max_objects=int(rng.integers(1, 6)), max_overlap=float(rng.choice([1.0, 0.5, 1 / 3])))
    return row, detections, limits if rng.random() < 0.5 else Limits()


def test_verdicts_and_reasons():
    rng, right = np.random.default_rng(0), 0
    for _ in range(2000):
        row, detections, limits = random_case(rng)
        found = judge(row, detections, lambda _name, objects: [d.mask for d in objects], limits)
        assert (found.correct, found.reason) == plain_verdict(row, detections, limits), (row, detections, limits)
        right += found.correct
    assert 100 < right < 1500


def test_relations_and_overlaps_on_a_grid():
    """All pairs of small boxes with corners on a grid of 5 pixels: every relation's limit is among them."""
    places = [
        (float(x), float(y), float(x + w), float(y + h)) for x, y, w, h in itertools.product((0, 5, 20, 40), (0, 10, 40), (5, 20), (10, 15))
    ]
    for a, b in itertools.product(places, places):
        assert set(relative_position(a, b)) == plain_position(a, b, 0.1), (a, b)
        assert iou(a, b) == pytest.approx(plain_iou(a, b))


def test_degenerate_boxes_overlap_nothing_and_divide_by_nothing():
    inside_out, point = (10.0, 10.0, 2.0, 2.0), (5.0, 5.0, 5.0, 5.0)
    for a, b in itertools.product((inside_out, point, (0.0, 0.0, 0.0, 0.0)), repeat=2):
        assert iou(a, b) == pytest.approx(plain_iou(a, b))
        assert set(relative_position(a, b)) <= set(RELATIONS)


def test_summaries_of_uneven_tasks():
    """pandas prints halves to even, as Python does: 0.5 % steps of 200 images."""
    rows = [
        {"tag": tag, "metadata": f"{tag} {i // 4}", "correct": i % k == 0} for tag, n, k in (("a", 200, 3), ("b", 7, 2)) for i in range(n)
    ]
    total = score(rows)
    assert total.overall == pytest.approx((67 / 200 + 4 / 7) / 2)
    text = summary(rows)
    assert "a                = 33.50% (67 / 200)" in text
    assert "b                = 57.14% (4 / 7)" in text
    assert "% correct prompts: 100.00%" in text


# --- T2I-CompBench and DPG-Bench --------------------------------------------------------------------------------------------------


def plain_2d(locality, a, b):
    (ax, ay), (bx, by) = ((a[0] + a[2]) / 2, (a[1] + a[3]) / 2), ((b[0] + b[2]) / 2, (b[1] + b[3]) / 2)
    dx, dy = bx - ax, by - ay
    if locality in ("next to", "near", "on side of"):
        return 1.0 if abs(dx) < 150 or abs(dy) < 150 else 150 / max(abs(dx), abs(dy))
    holds = {
        "on the right of": dx < 0 and abs(dx) > abs(dy),
        "on the left of": dx > 0 and abs(dx) > abs(dy),
        "on the bottom of": dy < 0 and abs(dy) > abs(dx),
        "on the top of": dy > 0 and abs(dy) > abs(dx),
    }[locality]
    width, height = max(0, min(a[2], b[2]) - max(a[0], b[0])), max(0, min(a[3], b[3]) - max(a[1], b[1]))
    union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - width * height
    overlap = width * height / union
    return 0.0 if not holds else 1.0 if overlap < 0.1 else 0.1 / overlap


def test_positions_and_scores_in_the_plane():
    rng = np.random.default_rng(1)
    for _ in range(3000):
        (a, b), locality = random_boxes(rng), (*DIRECTIONS, "next to", "near", "on side of")[rng.integers(7)]
        assert position_2d(locality, a, b) == pytest.approx(plain_2d(locality, a, b))
        s1, s2 = rng.choice([0.0, 0.5, 0.9, 1.0], 2).tolist()
        objects = [Labelled("dog", s1, a)] * rng.integers(0, 2) + [Labelled("cup", s2, b)] * rng.integers(0, 2)
        there = {found.label for found in objects}
        expected = 0.25 * s1 * ("dog" in there) + 0.25 * s2 * ("cup" in there)
        if len(there) == 2:
            expected += plain_2d(locality, a, b) / 2
        got = score_2d(f"a dog {locality} a cup", objects, ("dog", "cup"))
        assert got == pytest.approx(expected if expected >= 0.5 else 0.0)


def random_boxes(rng):
    corners = rng.integers(0, 30, (2, 2)) * 15
    sizes = rng.integers(1, 12, (2, 2)) * 15
    return [tuple(map(float, (*corner, *(corner + size)))) for corner, size in zip(corners, sizes, strict=True)]


def test_numeracy_counts_and_renames():
    rng = np.random.default_rng(2)
    names, prompt_words = ("dog", "hot dog", "cup", "person"), ("dog", "cup", "man", "cat")
    for _ in range(2000):
        objects = [Labelled(names[rng.integers(4)], 0.9, (200.0 * i, 0.0, 200.0 * i + 50, 50.0)) for i in range(rng.integers(0, 6))]
        wanted = [(str(word), int(rng.integers(1, 4))) for word in rng.choice(prompt_words, rng.integers(1, 4), replace=False)]
        labels, expected = [found.label for found in objects], 0.0
        for word, count in wanted:
            label = "person" if word == "man" else word
            if label not in labels:
                labels = [label if label in other else other for other in labels]
            expected += (0.5 * (label in labels) + 0.5 * (label in labels and labels.count(label) == count)) / len(wanted)
        assert numeracy_score(wanted, objects) == pytest.approx(expected), (wanted, objects)


def test_dependencies_of_questions():
    rng = np.random.default_rng(3)
    for _ in range(2000):
        n = int(rng.integers(1, 9))
        parents = {q: sorted({int(p) for p in rng.integers(0, n + 1, rng.integers(1, 3))} - {q}) or [0] for q in range(1, n + 1)}
        answers = {q: ("yes", "yes", "no", "Yes")[rng.integers(4)] for q in parents}
        values = {q: float(answers[q] == "yes") for q in parents}
        for q, needed in parents.items():  # in the order of asking; a parent that comes later counts as it was answered
            if any(p and values[p] == 0 for p in needed):
                values[q] = 0.0
        assert image_score(parents, answers) == pytest.approx(sum(values.values()) / n)
