# The same names as in scripts/; nothing happens here that does not happen there.
.PHONY: install demo test ci

install demo test:
	./scripts/$@

ci:
	.ci/run
