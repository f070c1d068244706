"""Parameter groups: which parameter takes which rule, and the learning rate of each group that was given one."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import Any, NamedTuple, TypeAlias

import mlx.core as mx

from . import checks, rates
from .checks import shown
from .leaves import OWN, Leaves
from .trees import FROZEN, Keys, dotted, existing
from .update.rule import Rule

Predicate: TypeAlias = Callable[[str, mx.array], bool]
RULE_KEYS = ("lr_decay", "eps", "weight_decay", "maximize")
KEYS = ("params", "lr", *RULE_KEYS)


class Group(NamedTuple):
    """One entry of ``groups``: what it matches, its rule, and its learning rate (None: the optimizer's)."""

    patterns: tuple[str | Predicate, ...]
    rule: Rule
    lr: mx.array | rates.Schedule | None

    def matches(self, path: str, parameter: mx.array) -> bool:
        """Whether the parameter at ``path`` belongs to this group."""
        return any(_matches(pattern, path, parameter) for pattern in self.patterns)


def listed(owner: str, groups: Any) -> list[Any]:
    """The entries of ``groups`` as a list; raises TypeError for what is none, as a single group."""
    if isinstance(groups, str | Mapping) or not isinstance(groups, Iterable):
        hint = ": put the dict in a list" if isinstance(groups, Mapping) else ""
        raise TypeError(f"[{owner}] 'groups' must be a list of dicts but got {shown(groups)}{hint}.")
    return list(groups)


def fixed(rate: mx.array | rates.Schedule | None) -> Any:
    """What a trace keeps of a learning rate: which schedule it is, not the number that the state holds."""
    return rate if rate is None or callable(rate) else "a number"


def _matches(pattern: str | Predicate, path: str, parameter: mx.array) -> bool:
    if callable(pattern):
        return pattern(path, parameter)
    return path == pattern or fnmatchcase(path, pattern)  # an exact path may hold brackets


class Groups:
    """The groups of one optimizer, first match first; what matches none takes the default rule.

    Args:
        rule: The default rule.
        entries: Dicts of ``params`` (a glob, a list of globs, or a predicate on (path, array)) and any of ``lr``,
            ``lr_decay``, ``eps``, ``weight_decay`` and ``maximize``.
        decays: Predicate on (path, array): whether a parameter is subject to weight decay. Default: every one is.
        ignored_keys: Further keys, of numbers >= 0, that a group may have without effect.
        eps_must_be_positive: Refuse a group with an eps of 0 where ``v`` starts from 0.

    Raises:
        ValueError: For an unknown key, a missing ``params``, a pattern given twice, or a bad hyperparameter.
        TypeError: For an entry that is no dict, or a pattern that is neither a string nor a callable.
    """

    changes = 0  # how often a compiled step had to be traced again: state.State.mark_changed counts

    def __init__(
        self,
        rule: Rule,
        entries: Iterable[dict[str, Any]] | None = None,
        decays: Predicate | None = None,
        ignored_keys: tuple[str, ...] = (),
        eps_must_be_positive: bool = False,
    ):
        if decays is not None and not callable(decays):
            raise TypeError(f"[{rule.owner}] 'weight_decay_mask' must be callable but got {shown(decays)}.")
        self.default = rule
        self.decays = decays
        self.ignored_keys = ignored_keys
        self.eps_must_be_positive = eps_must_be_positive
        self.mask_spares_groups = False  # MindSpore's mask holds only for what is in no group
        self.groups: list[Group] = []
        self._resolved: dict[Keys, tuple[int | None, Rule]] = {}
        self._undecayed: dict[int | None, Rule] = {}
        self.unmatched: set[int] = set()
        for entry in [] if entries is None else listed(rule.owner, entries):
            self.append(self.parsed(entry))

    def __bool__(self) -> bool:
        return bool(self.groups) or self.decays is not None

    def append(self, group: Group) -> None:
        """Add a group at the end; it takes the parameters that no earlier group matches."""
        self.unmatched.add(len(self.groups))
        self.groups.append(group)
        self._resolved.clear()

    def parsed(self, entry: dict[str, Any]) -> Group:
        """The group that an entry of ``groups`` describes, to be the next one."""
        owner = f"{self.default.owner} groups[{len(self.groups)}]"
        if not isinstance(entry, dict):
            raise TypeError(f"[{owner}] a group must be a dict but got {shown(entry)}.")
        if "params" not in entry:
            raise ValueError(f"[{owner}] 'params' is missing: a glob, a list of globs, or a predicate (path, array).")
        return self._with(Group((), replace(self.default, owner=owner), None), entry, self.groups)

    def with_options(self, index: int, options: dict[str, Any]) -> tuple[int, Group]:
        """The index, counted from 0, and what group ``index`` would be with these options; :meth:`put` makes it so.

        Raises:
            ValueError: If there is no such group, or for an option as the constructor does.
            TypeError: As the constructor.
        """
        index = checks.integer(self.default.owner, "index", index)
        if not -len(self.groups) <= index < len(self.groups):
            hint = "; a group of all parameters is groups=[{'params': '*'}]" if not self.groups else ""
            raise ValueError(f"[{self.default.owner}] there is no group {index}: there are {len(self.groups)}{hint}.")
        index %= len(self.groups)
        return index, self._with(self.groups[index], options, self.groups[:index] + self.groups[index + 1 :])

    def put(self, index: int, group: Group) -> bool:
        """Make ``group`` that of ``index``; returns whether more has changed than one learning rate for another."""
        old, self.groups[index] = self.groups[index], group
        if old.patterns != group.patterns:
            self.unmatched.add(index)
        self._resolved.clear()
        self._undecayed.clear()
        return old._replace(lr=fixed(old.lr)) != group._replace(lr=fixed(group.lr))

    def _with(self, group: Group, options: dict[str, Any], others: list[Group]) -> Group:
        """``group`` with options that a group may have, checked."""
        owner = group.rule.owner
        for key in options:
            if key in self.ignored_keys:
                checks.non_negative(owner, key, options[key])
            elif key not in KEYS:
                known = ", ".join((*KEYS, *self.ignored_keys))
                raise ValueError(f"[{owner}] unknown key {key!r}: a group may have {known}.")
        patterns = self._patterns(options["params"], owner, others) if "params" in options else group.patterns
        rule = replace(group.rule, **{k: options[k] for k in RULE_KEYS if k in options})
        if rule.eps == 0 and not rule.initial_accumulator_value and self.eps_must_be_positive:
            raise ValueError(f"[{owner}] 'eps' should be >0 unless initial_accumulator_value is, but got {rule.eps}.")
        lr = options.get("lr", group.lr)
        return Group(patterns, rule, None if lr is None else rates.parse(owner, "lr", lr))

    def _patterns(self, params: Any, owner: str, others: list[Group]) -> tuple[str | Predicate, ...]:
        patterns = tuple(params) if isinstance(params, list | tuple) else (params,)
        known = [p for group in others for p in group.patterns]
        for i, pattern in enumerate(patterns):
            if not isinstance(pattern, str) and not callable(pattern):
                got = shown(pattern)
                raise TypeError(f"[{owner}] 'params' must be globs or a predicate (path, array) but got {got}.")
            if pattern in known or pattern in patterns[:i]:
                raise ValueError(f"[{owner}] the pattern {pattern!r} is given twice: the second could never match.")
        if not patterns:
            raise ValueError(f"[{owner}] 'params' must not be empty.")
        return patterns

    def resolve(self, keys: Keys, parameter: mx.array) -> tuple[int | None, Rule]:
        """The group whose learning rate holds at ``keys`` (None: the default's), and the rule; decided once."""
        if keys not in self._resolved:
            path = dotted(keys)
            index = next((i for i, group in enumerate(self.groups) if group.matches(path, parameter)), None)
            rule = self.default if index is None else self.groups[index].rule
            decays = None if index is not None and self.mask_spares_groups else self.decays
            if decays is not None and not decays(path, parameter):
                rule = self._undecayed.setdefault(index, replace(rule, weight_decay=0.0))
            own_lr = index is not None and self.groups[index].lr is not None
            self._resolved[keys] = (index if own_lr else None, rule)
        return self._resolved[keys]

    def resolve_all(self, leaves: Leaves) -> list[tuple[int | None, Rule]]:
        """:meth:`resolve` for every leaf; before a step changes anything, since the user's predicates may raise."""
        known = self._resolved
        pairs = zip(leaves.keys, leaves.parameters, strict=True) if self else ()
        return [known.get(keys) or self.resolve(keys, w) for keys, w in pairs]

    def states(self, state: dict[str, Any]) -> list[dict[str, Any]]:
        """The groups' own entries in an optimizer's state: a learning rate for each group that has one.

        Made in place where they are missing: for a new group, and in state from elsewhere.
        """
        if not self.groups:
            return []
        entries = state.setdefault(OWN, {}).setdefault("groups", [])
        for problem in self.problems(state):
            raise type(problem)(f"[{self.default.owner}] {problem}")
        entries.extend({} for _ in self.groups[len(entries) :])
        for group, entry in zip(self.groups, entries, strict=True):
            if group.lr is not None and "learning_rate" not in entry:
                entry["learning_rate"] = rates.starting(group.lr, state["step"])
        return entries

    def problems(self, state: dict[str, Any]) -> Iterator[Exception]:
        """What of a state does not fit the groups."""
        own = state.get(OWN, {})
        entries = own.get("groups", []) if isinstance(own, dict) else own
        if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
            yield TypeError("'_mlx_adagrad' of the state must be {'groups': a list of dicts}.")
            return
        if len(entries) > len(self.groups) and any(entries):
            yield ValueError(f"the state is that of {len(entries)} groups, but there are {len(self.groups)}.")
        for i, entry in enumerate(entries):
            rate = entry.get("learning_rate")
            if rate is not None and (not isinstance(rate, mx.array) or rate.shape):
                yield ValueError(f"'learning_rate' of group {i} in the state must be one number but got {rate!r:.40}.")

    def check_matches(self, parameters: Any) -> None:
        """Raise ValueError for a group that matches no parameter, frozen ones included; asked until it has."""
        if not self.unmatched:
            return
        pairs = [(dotted(keys), w) for keys, w in existing(parameters)]
        for index in sorted(self.unmatched) if pairs else ():
            group = self.groups[index]
            if not any(group.matches(path, w) for path, w in pairs):
                shown = ", ".join(repr(p) for p in group.patterns)
                raise ValueError(f"[{group.rule.owner}] 'params' {shown} matches no parameter; {FROZEN}.")
            self.unmatched.discard(index)
