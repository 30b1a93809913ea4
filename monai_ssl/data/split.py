# SPDX-License-Identifier: Apache-2.0
"""Which items are for training, validation and testing, and which of them are labelled."""

from __future__ import annotations

import hashlib
import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from monai_ssl.data.layout import name_some

__all__ = ["select_labelled"]

logger = logging.getLogger(__name__)


def split_lists(
    lists: Mapping[str, list[dict[str, Any]]],
    val_fraction: float,
    test_fraction: float,
    seed: int,
    by_class: bool = False,
) -> dict[str, list[dict[str, Any]]]:
    """The three parts, those that are empty drawn by subject from the training items; see `build_datalist`.

    Args:
        lists: items of the parts that the dataset has itself.
        val_fraction: share of the subjects, or of those of each class.
        test_fraction: likewise.
        seed: of the split.
        by_class: each class (the set of "label" of a subject) is split by itself, see `build_class_datalist`.
    """
    if not lists["training"]:  # nothing to draw from
        return dict(lists)
    wanted = {"validation": val_fraction, "test": test_fraction}
    shares = {part: 0.0 if lists[part] else share for part, share in wanted.items()}
    split = _split(lists["training"], shares, seed, by_class)
    result = {part: lists[part] if part != "training" and lists[part] else split[part] for part in lists}
    for part, items in result.items():
        logger.info(f"{part}: {len(items)} volumes of {len({item['subject'] for item in items})} subjects")
    return result


def select_labelled(
    items: Sequence[Any], num_labelled: int | float, seed: int = 0, by_class: bool = False
) -> list[Any]:
    """A random draw of labelled items; with the same seed a smaller draw is the beginning of a larger one.

    Args:
        items: items of a datalist.
        num_labelled: a count (int) or a share of the items (float above 0, at most 1; at least one item).
        seed: of the draw.
        by_class: "label" is a class: one item of each class comes first, then each class in its proportion.

    Raises:
        ValueError: the number is neither, or above the number of items.
    """
    if isinstance(num_labelled, bool) or not isinstance(num_labelled, (int, float)):
        raise ValueError(f"num_labelled must be a count (int) or a share (float), got {num_labelled!r}")
    if isinstance(num_labelled, float):
        if not 0 < num_labelled <= 1:
            raise ValueError(f"num_labelled as a share must be above 0 and at most 1, got {num_labelled}")
        count = max(1, _round(num_labelled * len(items)))
    else:
        count = num_labelled
    if not 1 <= count <= len(items):
        raise ValueError(f"num_labelled {num_labelled} asks for {count} of {len(items)} labelled items")
    ranked = sorted(items, key=lambda item: _rank(seed, str(item.get("name", item.get("image")))))
    return (_in_turns(ranked) if by_class else ranked)[:count]


def _in_turns(items: Sequence[Any]) -> list[Any]:
    """Items in an order whose beginnings hold every class, in proportion where they are long enough."""
    total = Counter(item["label"] for item in items)
    seen: Counter[Any] = Counter()
    places = []
    for item in items:
        label = item["label"]
        places.append((seen[label] > 0, (seen[label] + 0.5) / total[label] if seen[label] else 0.0))
        seen[label] += 1
    return [items[index] for index in sorted(range(len(items)), key=places.__getitem__)]


def _split(
    items: list[dict[str, Any]], shares: dict[str, float], seed: int, by_class: bool
) -> dict[str, list[dict[str, Any]]]:
    for part, share in shares.items():
        if not 0 <= share < 1:
            raise ValueError(f"the share of subjects for {part} must be at least 0 and below 1, got {share}")
    ranked = sorted({item["subject"] for item in items}, key=lambda subject: _rank(seed, subject))
    groups = _by_class(ranked, items) if by_class else [ranked]
    counts = [_counts(len(group), shares, spare_training=by_class) for group in groups]
    count = {part: sum(of_group[part] for of_group in counts) for part in shares}
    if len(ranked) <= sum(count.values()) or any(shares[part] and not count[part] for part in shares):
        raise ValueError(
            f"{len(ranked)} subjects cannot be split into training, {count['validation']} for validation and "
            f"{count['test']} for testing: set the shares to 0, or say with subject_pattern what a subject is "
            f"(found: {name_some(ranked)})"
        )
    part_of: dict[str, str] = {}
    for group, of_group in zip(groups, counts):
        first, last = of_group["validation"], len(group) - of_group["test"]  # the test part does not move validation
        for rank, subject in enumerate(group):
            part_of[subject] = "validation" if rank < first else "training" if rank < last else "test"
    return {
        part: [item for item in items if part_of[item["subject"]] == part]
        for part in ("training", "validation", "test")
    }


def _by_class(subjects: list[str], items: Sequence[dict[str, Any]]) -> list[list[str]]:
    """Subjects, in their order, by the classes of their items."""
    classes: dict[str, set[int]] = {}
    for item in items:
        classes.setdefault(item["subject"], set()).add(item["label"])
    groups: dict[tuple[int, ...], list[str]] = {}
    for subject in subjects:
        groups.setdefault(tuple(sorted(classes[subject])), []).append(subject)
    return [groups[key] for key in sorted(groups)]


def _counts(number: int, shares: Mapping[str, float], spare_training: bool) -> dict[str, int]:
    """How many of so many subjects go to each part; a class is left to training before it is shared out."""
    counts: dict[str, int] = {}
    for part, share in shares.items():
        wanted = max(1, _round(share * number)) if share else 0
        counts[part] = min(wanted, number - 1 - sum(counts.values())) if spare_training else wanted
    return counts


def _rank(seed: int, text: str) -> str:
    return hashlib.sha256(f"{seed}:{text}".encode()).hexdigest()


def _round(number: float) -> int:
    return int(number + 0.5)
