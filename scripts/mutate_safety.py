"""Mutation testing: remove each safety rule of verification and updates in turn, and expect a test to fail.

    python scripts/mutate_safety.py [--only TEXT] [--tests PATH ...]

Works on a copy of the package and its tests. Exit code 1 if a rule can be taken out unnoticed.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parents[1]
TESTS = (
    "tests/update",
    "tests/bundles",
    "tests/device/test_policy.py",
    "tests/device/test_health.py",
    "tests/device/test_client_files.py",
    "tests/device/test_install.py",
    "tests/device/test_interrupted.py",
    "tests/device/test_version.py",
    "tests/device/test_doctor.py",
    "tests/device/test_provision.py",
    "tests/device/test_arithmetic.py",
    "tests/device/test_ways_out.py",
    "tests/device/test_foreign.py",
)  # tests/device/test_faults.py takes out each fsync itself
VERIFY_TESTS = (
    "tests/verify",
    "tests/report/test_json_format.py",
    "tests/test_compare.py",
    "tests/pipeline/verification",
    "tests/pipeline/test_bundle.py",
    "tests/pipeline/test_signed_release.py",
    "tests/test_faults.py",
)
# file, what stands there, what is put in its place
VERIFY_RULES = [
    ("verify/results/check.py", "if self.verdict is Verdict.PASS and not 0 < self.looked_at == self.of:", "if False:"),
    ("verify/results/check.py", "if self.verdict is Verdict.PASS and not self._decided():", "if False:"),
    ("verify/results/check.py", "        elif 0 < looked_at == of:", "        elif looked_at == of:"),
    ("verify/results/check.py", "        if listed:\n            more", "        if False:\n            more"),
    ("verify/results/check.py", "    if Verdict.FAIL in applicable:", "    if False:"),
    (
        "verify/results/check.py",
        "Verdict.PASS if applicable == {Verdict.PASS}",
        "Verdict.PASS if Verdict.PASS in applicable",
    ),
    ("verify/results/proof.py", "return bool(self.digest) and self.digest == self.expected", "return True"),
    ("verify/results/parity.py", "        return max_abs <= tolerance and min_cosine", "        return min_cosine"),
    ("verify/parity.py", "            or control.verdict is not Verdict.PASS\n", ""),
    ("verify/parity.py", "if not np.isfinite(differences).all():", "if False:"),
    ("verify/parity.py", "any(candidate.shape != reference.shape for candidate in candidates)", "False"),
    ("verify/parity.py", "elif not tower.max_abs <= gate.max_abs:", "elif False:"),
    ("verify/parity.py", "elif not tower.min_cosine >= gate.min_cosine:", "elif False:"),
    ("verify/parity.py", "if not flip.margin <= gate.flip_margin]", "if False]"),
    ("verify/parity.py", "stated = max_abs if max_abs <= self.max_abs else self.max_abs", "stated = max_abs"),
    ("verify/parity.py", "    if len(embeddings) != len(values):", "    if False:"),
    (
        "verify/proof.py",
        'problems = [f"{name} has another structure" for name, (left, right)',
        'problems = ["" for name, (left, right) in () for name, (left, right)',
    ),
    (
        "verify/proof.py",
        "for name, path in base.items() if not path.is_file()]",
        "for name, path in () if not path.is_file()]",
    ),
    ("verify/proof.py", "    if base.flops != release.flops:", "    if False:"),
    ("verify/proof.py", "    if base.weight_bytes != release.weight_bytes:", "    if False:"),
    ("verify/proof.py", "blind = [rung for rung, apart in told_apart.items() if not apart]", "blind = []"),
    ("verify/graph_digest.py", "operands = [scope.find(name) for name in node.input]", "operands = len(node.input)"),
    (
        "verify/graph_digest.py",
        "return [attribute.type, repr(value",
        "return [attribute.type, str(type(value)) or repr(value",
    ),
    ("verify/paired_stats.py", "    if not noise.within(margin):", "    if False:"),
    ("verify/paired_stats.py", "    if low > 1 + margin:", "    if False:"),
    ("verify/contents.py", "if manifest.sha256 != manifest.digest():", "if False:"),
    ("verify/contents.py", "for name in sorted(set(required) - set(manifest.files))]", "for name in ()]"),
    ("verify/contents.py", "or sha256_file(path) != entry.sha256:", "or False:"),
    ("verify/contents.py", "    if path.is_symlink() or not path.is_file():", "    if not path.is_file():"),
    ("verify/contents.py", "        elif sha256_bytes(values", "        elif False and sha256_bytes(values"),
    ("verify/contents.py", 'elif values.dtype.kind == "f" and not np.isfinite(values).all():', "elif False:"),
    ("verify/contents.py", "!= np.ascontiguousarray(expected).tobytes():", "is None:"),
    ("verify/contents.py", "    if not errors.max() <= tolerance:", "    if errors.max() > tolerance:"),
    ("verify/contents.py", "    if len(stored) != len(classes.classes):", "    if False:"),
    (
        "verify/golden.py",
        "GATES[manifest.precision].no_laxer_than(manifest.golden.max_abs, manifest.golden.min_cosine)",
        "GATES[manifest.precision]",
    ),
    ("verify/golden.py", "        if not error <= allowed:", "        if error > allowed:"),
    ("verify/client_files.py", "    if not (errors.max() <= most and errors.mean() <= mean):", "    if False:"),
    ("verify/client_files.py", "        if not np.all(same):", "        if False:"),
    ("verify/signature.py", "if bundle.manifest.name == name else", "if True else"),
    ("verify/signature.py", "        elif sha256_file(path) != sha256:", "        elif False:"),
    ("verify/signature.py", "        if not path.is_file():", "        if False:"),
    ("verify/signature.py", " | evidence\n", "\n"),
    ("verify/signature.py", "if not 1 <= threshold <= len(trusted):", "if False:"),
    (
        "pipeline/verification/release.py",
        "replace(own_contents(path, manifest, started.get(path), base, runs), signature=signature)",
        "own_contents(path, manifest, started.get(path), base, runs)",
    ),
    ("pipeline/verification/without_task.py", "        weights=attempt(weights, of=len(manifest.tensors)),\n", ""),
    ("pipeline/bundle.py", "    known_answers_hold_in_fresh_process()\n", ""),
    ("pipeline/bundle.py", "    if not path.is_file():", "    if False:"),
    ("pipeline/bundle.py", " or report.release.manifest_sha256 != release.manifest_sha256", ""),
    ("pipeline/bundle.py", "        check_fresh(report, release.path)\n", "        pass\n"),
    (
        "pipeline/bundle.py",
        "if release.manifest.updates and Verdict.NOT_APPLICABLE",
        "if False and Verdict.NOT_APPLICABLE",
    ),
    ("pipeline/bundle.py", "    if report.verdict is Verdict.FAIL:", "    if False:"),
    ("pipeline/bundle.py", "    if not order.accept_inconclusive:", "    if False:"),
    ("pipeline/bundle.py", "    if contents.verdict is not Verdict.PASS:", "    if False:"),
    ("pipeline/bundle.py", "replace(planned, limits=limits)", "planned"),
    ("verify/client_files.py", '_read(dict[str, int], folder / "vocab.json") != vocab:', "False:"),
    ("verify/client_files.py", "if vocab.get(token) != i)", "if False)"),
    ("report/json_format.py", '    if document.get("verdict") != report.verdict:', "    if False:"),
    ("report/freshness.py", "if not path.is_file() or sha256_file(path) != manifest_sha256:", "if False:"),
    ("pipeline/bundle.py", "        _check_on_a_device(planned.target", "        (planned.target"),
    ("report/freshness.py", "or file.is_symlink() or sha256_file(file) != entry.sha256:", "or file.is_symlink():"),
]
# file, what stands there, what is put in its place
RULES = [
    ("device/policy.py", "if installed.tries.get(digest, 0) >= MAX_TRIES:", "if False:"),
    ("device/policy.py", "if free < needed + RESERVE:", "if False:"),
    ("device/policy.py", "        if offered != own:", "        if False:"),
    ("device/policy.py", "if manifest.seq < installed.seq or (", "if ("),
    ("device/policy.py", " or (manifest.seq == installed.seq and digest != installed.digest):", ":"),
    ("device/policy.py", "    if seq < min_seq:", "    if False:"),
    ("device/policy.py", "    if is_expired(manifest, installed.clock, now):", "    if False:"),
    ("device/policy.py", "max(now, clock, manifest.created) >= manifest.expires", "now >= manifest.expires"),
    ("device/policy.py", "max(now, clock, manifest.created)", "max(now, manifest.created)"),
    ("device/policy.py", "    if manifest.seq > highest + installed.max_seq_jump:", "    if False:"),
    ("device/policy.py", "highest = max(installed.seq, installed.min_seq)", "highest = installed.seq"),
    ("device/policy.py", "    check_target(manifest, installed)\n    check_not_revoked", "    check_not_revoked"),
    (
        "device/policy.py",
        "    check_not_revoked(manifest.seq, installed.min_seq)\n    check_held(manifest, installed)\n    check_space",
        "    check_held(manifest, installed)\n    check_space",
    ),
    (
        "device/policy.py",
        "    check_held(manifest, installed)\n    check_space(free, needed)\n",
        "    check_space(free, needed)\n",
    ),
    ("device/policy.py", "if now < latest - CLOCK_SLACK:", "if False:"),
    ("device/policy.py", "if not update.experts and update.sha256 not in installed.held:", "if False:"),
    ("update/envelope.py", "if payload_type != PAYLOAD_TYPE:", "if False:"),
    ("update/envelope.py", "if threshold < 1:", "if False:"),
    ("update/envelope.py", "for key in dict.fromkeys(trusted):", "for key in trusted:"),
    ("update/envelope.py", "keyid == key.keyid and ", ""),
    ("update/envelope.py", "ed25519.is_strict(key.raw, sig) and ", ""),
    ("update/envelope.py", "if len(signers) < threshold:", "if not signers:"),
    ("update/bundle.py", "    if len(data) > MAX_BUNDLE:", "    if False:"),
    ("update/bundle.py", "if not data.startswith(MAGIC):", "if False:"),
    ("update/bundle.py", "if length > limit or ", "if "),
    ("update/bundle.py", "if start > len(data) or any(data[position:start]):", "if start > len(data):"),
    ("update/atomic_io.py", "if not stat.S_ISREG(os.fstat(descriptor).st_mode):", "if False:"),
    ("update/bundle.py", "if (found := hashlib.sha256(payload).hexdigest()) != manifest.payload_sha256:", "if False:"),
    ("update/bundle.py", "if any(payload[end:offset]):", "if False:"),
    ("update/bundle.py", "if (found := hashlib.sha256(factors.to_bytes()).hexdigest()) != update.sha256:", "if False:"),
    ("update/strict_json.py", "    if len(members) != len(pairs):", "    if False:"),
    ("update/strict_json.py", "    if len(data) > limit:", "    if False:"),
    ("update/strict_json.py", "    if len(text) > 17:", "    if False:"),
    ("update/strict_json.py", "not math.isfinite(value := float(text))", "(value := float(text)) is None"),
    ("update/strict_json.py", "    if type(value) is not int or not low", "    if not low"),
    ("update/strict_json.py", "        if unknown:", "        if False:"),
    ("update/strict_json.py", "or len(value) > limit:", "or False:"),
    ("update/strict_json.py", "or not pattern.fullmatch(value):", "or not pattern.match(value):"),
    ("update/release_manifest.py", "if file is None or tensor.end > file.nbytes:", "if False:"),
    ("update/release_manifest.py", "if tensor.scale and tensor.scale not in manifest.tensors:", "if False:"),
    ("update/release_manifest.py", "        fields.done(extensions=False)\n        check_paths", "        check_paths"),
    (
        "update/release_manifest.py",
        "        check_paths([*manifest.files, MANIFEST]",
        "        ([*manifest.files, MANIFEST]",
    ),
    ("update/release_manifest.py", '    if "bytes" in fields and (', "    if False and ("),
    ("update/release_manifest.py", "if len(ends) != 2 or ends[0] > ends[1]:", "if len(ends) != 2:"),
    ("update/container.py", "    if prod(max(size, 1) for size in shape) > MAX_ELEMENTS:", "    if False:"),
    ("update/names.py", "if parents & taken or name in OWN_FILES or any(", "if name in OWN_FILES or any("),
    ("update/names.py", "or any(map(is_special, segments)):", "or False:"),
    ("update/names.py", "    if len(taken) != len(names):", "    if False:"),
    ("update/factors.py", "if not (np.isfinite(self.u).all() and np.isfinite(self.v).all()):", "if False:"),
    ("update/factors.py", "if not np.isfinite(matrix[rows.start : rows.stop]).all():", "if False:"),
    ("device/install.py", "        check_not_revoked(_sequence(slot), state.min_seq)\n", ""),
    ("device/install.py", "        check_slot(device, slot)\n        if slot != BASE:", "        if slot != BASE:"),
    ("device/install.py", '        run("health", offer.slot)\n        device.switch', "        device.switch"),
    ("device/slot_files.py", "if (digest := sha256_file(inside(partial, path))) != sha256:", "if False:"),
    ("device/slot_files.py", "    if bundle.slot != slot:", "    if False:"),
    (
        "device/slot_files.py",
        "        check_file(inside(folder, path), sha256)\n",
        "        pass\n",
    ),
    ("device/health.py", "result.max_abs <= limits.max_abs)", "True)"),
    ("device/health.py", "result.min_cosine >= limits.min_cosine)", "True)"),
    ("device/health.py", "result.top1 >= limits.min_agreement)", "True)"),
    ("device/health.py", "    if not results:", "    if False:"),
    ("device/health.py", " or not np.isfinite(embeds).all():", ":"),
    ("device/health.py", "        elif version.merged_weights(graph):", "        elif False:"),
    (
        "device/health.py",
        "if golden.get(given, np.zeros(0)).size and answer in golden:",
        "if given in golden and answer in golden:",
    ),
    ("device/health.py", "    check_client_files(version, partial(_answer, version))\n", ""),
    ("device/client_files.py", "steps.max() <= BYTES and ", ""),
    ("device/client_files.py", " and steps.mean() <= MEAN_BYTES", ""),
    ("device/client_files.py", "if len(samples.pictures) > len(samples.pixel_values):", "if False:"),
    ("device/client_files.py", "        if found.shape != expected.shape:", "        if False:"),
    ("device/client_files.py", "    if len(stds) != 3:", "    if False:"),
    ("device/client_files.py", "if row != expected]", "if False]"),
    ("device/client_files.py", " or len(rows) != len(samples.input_ids):", ":"),
    ("device/version.py", "        check_digest(path, sha256_bytes(data), self._digests[path])\n", ""),
    ("device/version.py", "        check_digest(file.path, digest.hexdigest(), file.sha256)\n", ""),
    (
        "device/worker.py",
        "            check_digest(file.path, base.manifest.files[file.path].sha256, file.sha256)",
        "            pass",
    ),
    ("device/worker.py", "own is None or own.nbytes != file.nbytes):", "own is None):"),
    ("device/worker.py", "if is_graph(file.path) and ", "if False and "),
    ("device/worker.py", "if file.path in base.manifest.weights and file.parts is not None:", "if False:"),
    (
        "device/worker.py",
        "_finish(verb, name, command, [])).returncode",
        "_finish(verb, name, command, [descriptor])).returncode",
    ),
    ("device/worker.py", "if not process.stdout.startswith(_STARTED):", "if False:"),
    ("device/worker.py", "if process.returncode == -signal.SIGKILL:", "if False:"),
    ("device/version.py", 'self.bundle.manifest.tensors.get(name, "nothing")', "sha256_bytes(piece)"),
    ("device/store.py", "if (found := sha256_bytes(data)) != sha256:", "if (found := sha256) != sha256:"),
    ("device/health.py", "flipped = distances[rows, now] > reach", "flipped = now != best"),
    ("device/health.py", "(distances.min(1) > reach) | flipped", "distances.min(1) > -1"),
    ("device/worker.py", "os.killpg(process.pid, signal.SIGKILL)", "process.kill()"),
    ("device/provision.py", "    health_command(config.health)\n", ""),
    ("device/provision.py", "    if sha256 and release.manifest_sha256 != sha256:", "    if False:"),
    ("device/provision.py", "    if digest.hexdigest() != sha256:", "    if False:"),
    ("device/provision.py", "        _check_health(device, run)\n", ""),
    ("device/provision.py", "target = inside(to, path)", "target = to / path"),
    ("device/provision.py", "        if not NAME.fullmatch(value):", "        if False:"),
    ("device/provision.py", "not 1 <= config.keep <= MAX_KEEP", "config.keep < 1"),
    ("device/provision.py", "if len(config.health) > 1000 or not config.health.isprintable():", "if False:"),
    ("device/health.py", "min(limits.max_abs, CEILING.max_abs)", "limits.max_abs"),
    ("device/health.py", "max(limits.min_cosine, CEILING.min_cosine)", "limits.min_cosine"),
    ("device/health.py", "    except Exception as error:  # onnx", "    except ZeroDivisionError as error:  # onnx"),
    ("device/version.py", "        self.read(graph)  # a graph is code", "        # a graph is code"),
    ("device/version.py", "inside(self.folder, path)", "self.folder / path"),
    ("device/install.py", "    damaged = not is_whole(device, offer)\n", "    damaged = False\n"),
    ("device/install.py", "    renewed = store_bundle(device, offer)\n", "    renewed = False\n"),
    ("device/install.py", "            store_bundle(device, offer)\n", "            pass\n"),
    ("device/slot_files.py", "        _clear(folder, path)\n", ""),
    ("device/install.py", '        run("health", offer.slot)\n    renewed', "    renewed"),
    ("device/install.py", "            with _swept(device):\n", "            with suppress():\n"),
    ("device/install.py", '            remove(device.path / "current")\n', "            pass\n"),
    ("device/store.py", "max(state.min_seq, self.config.min_seq)", "state.min_seq"),
    ("device/store.py", "os.fchmod(descriptor, LOCK_MODE)", "pass"),
    ("device/store.py", "        path.chmod(FILE_MODE)  # independent", "        # independent"),
    ("device/store.py", "        except (R1ExportError, OSError):  # also", "        except R1ExportError:  # also"),
    ("device/state.py", "if name in members}", "}"),
    ("device/arithmetic.py", '    ("f4", 1.0, [(33 * 2.0**-39, 1016801 * 2.0**-39), (-1.0, 1.0)], 2.0**-52),\n', ""),
    ("device/__main__.py", "printable(line).encode", "line.encode"),
    ("device/__main__.py", '.encode(encoding, "backslashreplace")', ".encode(encoding)"),
    ("device/__main__.py", "    if is_out_of_memory(error):", "    if False:"),
    ("device/__main__.py", "    except BrokenPipeError:", "    except ZeroDivisionError:"),
    ("update/plain_text.py", '"Cc", "Cf", "Cs", "Zl", "Zp"', '"Cc", "Cs", "Zl", "Zp"'),
    ("update/plain_text.py", '"Cc", "Cf", "Cs", "Zl", "Zp"', '"Cc", "Cf", "Cs"'),
    ("update/atomic_io.py", " and name.isprintable()", ""),
    ("update/atomic_io.py", " or any(path.is_symlink() for path in ways):", ":"),
    ("update/atomic_io.py", 'not {"", ".", ".."} & set(segments)', "True"),
    ("update/atomic_io.py", "    if not stat.S_ISREG(os.fstat(descriptor).st_mode):", "    if False:"),
    ("update/atomic_io.py", "    if len(data) > limit:", "    if False:"),
    ("update/atomic_io.py", "            os.chmod(temporary, mode)", "            pass"),
    ("update/atomic_io.py", "    path.chmod(FOLDER_MODE)\n", ""),
    ("update/container.py", "if prod(max(size, 1) for size in shape) > MAX_ELEMENTS:", "if False:"),
    ("device/store.py", "            if slot == unfinished:", "            if False:"),
    ("device/store.py", "if state.awaits(slot) and slot != self.active)", "if state.awaits(slot))"),
    ("device/store.py", "if state.pending == state.digest:", "if False:"),
    ("device/store.py", "if known and target == _target(name) else", "if known else"),
    ("device/state.py", 'if "sha256" in fields and fields.digest', "if False and fields.digest"),
    ("device/state.py", "    fields.done()  # a flipped bit", "    # a flipped bit"),
    ("device/install.py", "        retire(device.folder(unfinished))\n", ""),
    (
        "device/install.py",
        "        _check_reverted(device, previous, error)\n        raise\n    _prune",
        "        raise\n    _prune",
    ),
    ("device/install.py", " and not is_rotten(device, offer)", ""),
    ("device/install.py", "if digest not in (forget, installed)}", "if digest != forget}"),
    ("update/lab/publish.py", "if is_graph(path) and old.get(path) != new.get(path):", "if False:"),
    ("update/lab/publish.py", "if self.expires and self.created >= self.expires:", "if False:"),
    (
        "update/lab/publish.py",
        "if path in old_files and (path in rebuild.base.manifest.weights or ",
        "if path in old_files and (",
    ),
    ("update/strict_json.py", '    if text == "-0":', "    if False:"),
]


def noticed(file: str, old: str, new: str, *batches: Sequence[str]) -> bool:
    """Whether a test of any batch fails once `old` is replaced. SystemExit if it is not there: the list is out of date."""
    text = (ROOT / "r1export" / file).read_text(encoding="utf-8")
    if old not in text:
        sys.exit(f"{file} has no longer: {old.strip()}")
    with tempfile.TemporaryDirectory() as name:
        for part in ("r1export", "tests", "docs", "scripts"):
            shutil.copytree(ROOT / part, Path(name) / part, ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(ROOT / "pyproject.toml", name)
        (Path(name) / "r1export" / file).write_text(text.replace(old, new, 1), encoding="utf-8")
        return any(_fails(Path(name), tests, f"{file}: {old.strip()}") for tests in batches if tests)


def _fails(copy: Path, tests: Sequence[str], rule: str) -> bool:
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *tests]
    done = subprocess.run(command, cwd=copy, env=os.environ | {"PYTHONPATH": str(copy)}, capture_output=True, text=True)
    if done.returncode not in (0, 1):
        sys.exit(f"{rule}: the tests did not run\n{done.stdout[-2000:]}")
    return done.returncode == 1


def batches_of(file: str) -> tuple[Sequence[str], Sequence[str]]:
    """The tests of a module itself, which are quick, and then all that concern it."""
    own = Path("tests") / Path(file).parent / f"test_{Path(file).name}"
    tests = VERIFY_TESTS if file.startswith(("verify/", "report/", "pipeline/")) else TESTS
    return ((own.as_posix(),) if (ROOT / own).exists() else (), tests)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="rules whose file or text holds this")
    parser.add_argument("--tests", nargs="+", help="run these instead of all that concern the rule")
    asked, missed = parser.parse_args(), 0
    rules = [rule for rule in (*VERIFY_RULES, *RULES) if asked.only in rule[0] + rule[1]]
    for file, old, new in rules:
        result = noticed(file, old, new, *((asked.tests,) if asked.tests else batches_of(file)))
        missed += not result
        print(
            f"{'noticed' if result else 'UNNOTICED'}: {file}: {old.strip()} -> {new.strip() or 'nothing'}", flush=True
        )
    print(f"{len(rules) - missed} of {len(rules)} rules are held by a test")
    sys.exit(int(missed > 0))


if __name__ == "__main__":
    main()
