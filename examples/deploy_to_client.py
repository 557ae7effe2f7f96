"""A gate of a deployment pipeline: verify a release by itself, then make it the folder that a client opens.

    python examples/deploy_to_client.py RELEASE LAYOUT OUT
    python examples/deploy_to_client.py runs/quickstart/releases/03-signdigits fastembed models/clip

LAYOUT is transformersjs, fastembed, immich, openclip, ortpackage, triton, ovms or oci. Ends with the exit code of the verdict.
"""

import sys

import r1export

release, layout, out = sys.argv[1:]
try:
    report = r1export.verify_release(release, budget=None)  # without timing, which belongs on the target machine
    if report.verdict == "fail":
        raise r1export.CheckFailed(f"{release}: {'; '.join(report.reasons)}", "do not deploy it")
    written = r1export.layout_release(release, layout, out)
except r1export.R1ExportError as error:
    print(error, file=sys.stderr)
    sys.exit(error.exit_code)
print(f"{report.verdict}: {written.path}, {written.shared} files shared with the release")
for note in written.notes:
    print(f"  {note}")
