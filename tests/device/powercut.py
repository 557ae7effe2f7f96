"""A model of a disk that loses power: what was not synced may be there, half there, or not there.

Replays the calls of a real update. A file's content is certain after fsync of the file; a name in a folder is certain
after fsync of the folder; everything else is lost or kept in any combination (POSIX promises no more).
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

Tree = dict[str, bytes | str | dict]  # name -> file content, link target, or folder


@dataclass(eq=False)
class File:
    content: bytes = b""
    durable: bytes = b""

    def outcomes(self) -> list[bytes]:
        return (
            [self.content]
            if self.content == self.durable
            else [self.durable, self.content, self.content[: len(self.content) // 2]]
        )


@dataclass(eq=False)
class Link:
    target: str


@dataclass(eq=False)
class Folder:
    now: dict[str, File | Link | Folder] = field(default_factory=dict)
    durable: dict[str, File | Link | Folder] = field(default_factory=dict)
    pending: list[Mapping[str, File | Link | Folder | None]] = field(
        default_factory=list
    )  # each one atomic: name -> node or gone

    def do(self, operation: Mapping[str, File | Link | Folder | None]) -> None:
        self.now = _after(self.now, operation)
        self.pending.append(operation)

    def sync(self) -> None:
        self.durable, self.pending = dict(self.now), []

    def outcomes(self) -> list[dict[str, File | Link | Folder]]:
        """None of the pending operations, each alone, all but each, every beginning, all."""
        count = len(self.pending)
        chosen = {frozenset(range(n)) for n in range(count + 1)}
        chosen |= {frozenset([n]) for n in range(count)} | {frozenset(range(count)) - {n} for n in range(count)}
        found = []
        for choice in sorted(chosen, key=sorted):
            names = dict(self.durable)
            for number in sorted(choice):
                names = _after(names, self.pending[number])
            found.append(names)
        return found


def _after(names: Mapping, operation: Mapping) -> dict:
    return {name: node for name, node in {**names, **operation}.items() if node is not None}


class Disk:
    """A store on this disk; `apply` replays one call of `strace.record`."""

    def __init__(self, store: Path) -> None:
        self.store = store
        self.root = _load(store)

    def apply(self, call) -> None:
        paths = [self._relative(string) for string in call.strings if str(self.store).encode() in string]
        if call.name == "openat":
            folder, name = self._folder(self._relative(call.path))
            if name not in folder.now:
                folder.do({name: File()})
        elif call.name == "write":
            self._node(self._relative(call.path)).content += call.strings[-1]
        elif call.name == "fsync":
            node = self._node(self._relative(call.path))
            if isinstance(node, Folder):
                node.sync()
            else:
                node.durable = node.content
        elif call.name == "mkdir":
            folder, name = self._folder(paths[0])
            folder.do({name: Folder()})
        elif call.name == "symlink":
            folder, name = self._folder(paths[0])
            folder.do({name: Link(call.strings[0].decode())})
        elif call.name == "rename":
            (folder, old), (other, new) = self._folder(paths[0]), self._folder(paths[1])
            assert folder is other, "a rename between folders is not one step on every file system"
            folder.do({new: folder.now[old], old: None})
        elif call.name in ("unlink", "unlinkat", "rmdir"):
            name = call.strings[0].decode()  # an absolute one, or one in the folder behind the descriptor
            folder, name = self._folder(self._relative(os.path.join(call.path, name)))
            folder.do({name: None})
        else:
            assert call.name == "chmod", call.name

    def states(self) -> Iterator[Tree]:
        """What may be found after a power cut now: one thing at a time takes each of its outcomes, the rest all lost or all kept."""
        nodes = list(_walk(self.root))
        for rest in (0, -1):
            yield _freeze(self.root, {}, rest)
            for node in nodes:
                for outcome in range(len(node.outcomes())):
                    yield _freeze(self.root, {node: outcome}, rest)

    def _relative(self, path: str | bytes) -> list[str]:
        text = path.decode() if isinstance(path, bytes) else path
        return list(Path(text).relative_to(self.store).parts)

    def _node(self, parts: list[str]) -> File | Link | Folder:
        node = self.root
        for part in parts:
            node = node.now[part]
        return node

    def _folder(self, parts: list[str]) -> tuple[Folder, str]:
        return self._node(parts[:-1]), parts[-1]


def _load(path: Path) -> Folder:
    folder = Folder()
    for child in path.iterdir():
        if child.is_symlink():
            folder.now[child.name] = Link(str(child.readlink()))
        elif child.is_dir():
            folder.now[child.name] = _load(child)
        else:
            folder.now[child.name] = File(child.read_bytes(), child.read_bytes())
    folder.sync()
    return folder


def _walk(folder: Folder) -> Iterator[File | Folder]:
    if folder.pending:
        yield folder
    for node in {**folder.durable, **folder.now}.values():
        if isinstance(node, Folder):
            yield from _walk(node)
        elif isinstance(node, File) and node.content != node.durable:
            yield node


def _freeze(folder: Folder, chosen: Mapping[File | Folder, int], rest: int) -> Tree:
    names = folder.outcomes()[chosen.get(folder, rest)] if folder.pending else folder.now
    tree: Tree = {}
    for name, node in names.items():
        if isinstance(node, Folder):
            tree[name] = _freeze(node, chosen, rest)
        elif isinstance(node, Link):
            tree[name] = node.target
        else:
            outcomes = node.outcomes()
            tree[name] = outcomes[chosen.get(node, 0 if rest == 0 else min(1, len(outcomes) - 1))]
    return tree


def write_tree(tree: Tree, path: Path) -> None:
    """Put a state on a real disk."""
    path.mkdir()
    for name, node in tree.items():
        if isinstance(node, dict):
            write_tree(node, path / name)
        elif isinstance(node, str):
            (path / name).symlink_to(node)
        else:
            (path / name).write_bytes(node)
