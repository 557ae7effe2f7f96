"""Take out each safety rule of the field updates in turn: some test has to fail, or nothing holds the rule.

    python scripts/mutate_safety.py [--only TEXT]

Works on a copy of the package and its tests. Exit code 1 if a rule can be taken out unnoticed.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
TESTS = (
    "tests/update",
    "tests/bundles",
    "tests/device/test_policy.py",
    "tests/device/test_health.py",
    "tests/device/test_install.py",
)
# file, what stands there, what is put in its place
RULES = [
    ("device/policy.py", "if installed.tries.get(digest, 0) >= MAX_TRIES:", "if False:"),
    ("device/policy.py", "if free < needed + RESERVE:", "if False:"),
    ("device/policy.py", "        if found != expected:", "        if False:"),
    ("device/policy.py", "if manifest.seq < installed.seq or (", "if ("),
    ("device/policy.py", " or (manifest.seq == installed.seq and digest != installed.digest):", ":"),
    ("device/policy.py", "    if seq < min_seq:", "    if False:"),
    ("device/policy.py", "if max(now, known) >= manifest.expires:", "if False:"),
    ("device/policy.py", "if max(now, known) >= manifest.expires:", "if now >= manifest.expires:"),
    ("device/policy.py", "if now < known - CLOCK_SLACK:", "if False:"),
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
    ("update/bundle.py", "if not stat.S_ISREG(found.st_mode) or ", "if "),
    ("update/bundle.py", "if (found := hashlib.sha256(payload).hexdigest()) != manifest.payload_sha256:", "if False:"),
    ("update/bundle.py", "if any(payload[end:offset]):", "if False:"),
    ("update/bundle.py", "if (found := hashlib.sha256(factors.to_bytes()).hexdigest()) != update.sha256:", "if False:"),
    ("update/strict.py", "    if len(found) != len(pairs):", "    if False:"),
    ("update/strict.py", "    if len(data) > limit:", "    if False:"),
    ("update/strict.py", "    if len(text) > 17:", "    if False:"),
    ("update/strict.py", "not math.isfinite(value := float(text))", "(value := float(text)) is None"),
    ("update/strict.py", "    if type(value) is not int or not low", "    if not low"),
    ("update/strict.py", "        if unknown:", "        if False:"),
    ("update/strict.py", "or len(value) > limit:", "or False:"),
    ("update/strict.py", "or not pattern.fullmatch(value):", "or not pattern.match(value):"),
    ("update/factors.py", "if not (np.isfinite(self.u).all() and np.isfinite(self.v).all()):", "if False:"),
    ("update/factors.py", "if not np.isfinite(matrix[rows.start : rows.stop]).all():", "if False:"),
    ("device/install.py", "        check_not_revoked(_sequence(slot), state.min_seq)\n", ""),
    ("device/install.py", "        check_slot(device, slot)\n        if slot != BASE:", "        if slot != BASE:"),
    ("device/install.py", '        run("health", offer.slot)\n', ""),
    ("device/install.py", "if (found := sha256_file(partial / file.path)) != file.sha256:", "if False:"),
    ("device/install.py", "    if bundle.slot != slot:", "    if False:"),
    (
        "device/install.py",
        "            check_file(device.folder(slot) / file.path, file.sha256)\n",
        "            pass\n",
    ),
    ("device/health.py", "found.max_abs <= limits.max_abs)", "True)"),
    ("device/health.py", "found.min_cosine >= limits.min_cosine)", "True)"),
    ("device/health.py", "found.top1 >= limits.min_agreement)", "True)"),
    ("device/health.py", "    if not found:", "    if False:"),
    ("device/health.py", " or not np.isfinite(one).all():", ":"),
]


def noticed(file: str, old: str, new: str) -> bool:
    """Whether a test fails once `old` is replaced. SystemExit if it is not there: the list is out of date."""
    text = (ROOT / "r1export" / file).read_text(encoding="utf-8")
    if old not in text:
        sys.exit(f"{file} has no longer: {old.strip()}")
    with tempfile.TemporaryDirectory() as name:
        for part in ("r1export", "tests", "docs", "scripts"):
            shutil.copytree(ROOT / part, Path(name) / part, ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(ROOT / "pyproject.toml", name)
        (Path(name) / "r1export" / file).write_text(text.replace(old, new, 1), encoding="utf-8")
        command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *TESTS]
        done = subprocess.run(command, cwd=name, env=os.environ | {"PYTHONPATH": name}, capture_output=True, text=True)
        if done.returncode not in (0, 1):
            sys.exit(f"{file}: {old.strip()}: the tests did not run\n{done.stdout[-2000:]}")
        return done.returncode == 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="rules whose file or text holds this")
    asked, missed = parser.parse_args(), 0
    rules = [rule for rule in RULES if asked.only in rule[0] + rule[1]]
    for file, old, new in rules:
        found = noticed(file, old, new)
        missed += not found
        print(f"{'noticed' if found else 'UNNOTICED'}: {file}: {old.strip()} -> {new.strip() or 'nothing'}", flush=True)
    print(f"{len(rules) - missed} of {len(rules)} rules are held by a test")
    sys.exit(int(missed > 0))


if __name__ == "__main__":
    main()
