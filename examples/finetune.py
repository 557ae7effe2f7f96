"""Fine-tune CLIP on a sequence of tasks, verify the releases, and see whether they may be deployed.

python examples/finetune.py RECIPE RUN [FIELD=VALUE ...]
python examples/finetune.py quickstart runs/quickstart train.iterations=30
"""

import sys

import r1export

recipe, run, *overrides = sys.argv[1:]
report = r1export.run(r1export.load_recipe(recipe, tuple(overrides)), run, resume=True)
assert report is not None  # None only in the other processes of torchrun

for release in report.releases:
    print(f"{release.name:24} {release.verdict}, {sum(1 for _ in release.checks())} checks")
accuracy = report.accuracy
for task, before, after in zip(accuracy.tasks, accuracy.zero_shot, accuracy.matrix[-1], strict=True):
    print(f"{task:24} zero-shot {before:.1%}, now {after:.1%}")

if report.verdict != "pass":
    sys.exit("not for deployment: " + "; ".join(report.reasons))
print(f"deploy {run}/releases/{report.releases[-1].name}")
