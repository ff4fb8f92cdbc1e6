# make race    find the best recipe for a digit recogniser (makes .venv first)
# make test    formatter check, linter, types, doctests, tests
# make slow    the tests that take minutes
# make faults  the fault matrix at its figures (docs/reliability.md); ROWS=f07 for one row
# make deep    500 random chains on every executor, and every rule in every dtype
# make clean   remove .venv and caches (not runs/)

PYTHON ?= python3
BIN := .venv/bin
TASK ?= digits-cnn
TESTS ?= not slow and not faults and not deep
ROWS ?=

.PHONY: race test check slow faults deep clean

race: .venv/has-tasks
	$(BIN)/downslope race $(TASK)

test: check
	$(BIN)/pytest -n 2 --dist loadgroup -m '$(TESTS)'

check: .venv/has-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

slow: .venv/has-dev
	$(BIN)/pytest -m 'slow and not faults and not deep'

faults: .venv/has-dev
	$(BIN)/pytest -m faults -k '$(ROWS)' --timeout 0 --hypothesis-profile searching

deep: .venv/has-dev
	$(BIN)/pytest -m deep --timeout 0 --hypothesis-profile searching

# A stamp says which extra .venv holds; it is older than what it was made from when that changed.
.venv/has-%: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[$*]'
	touch $@

clean:
	rm -rf .venv .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find . -name __pycache__ -prune -exec rm -rf {} +
