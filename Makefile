# The same names as in scripts/; nothing happens here that does not happen there.
.PHONY: install demo test docs ci

install demo test docs:
	./scripts/$@

ci:
	.ci/run
