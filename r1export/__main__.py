"""python -m r1export"""

from r1export.cli import main

main()
