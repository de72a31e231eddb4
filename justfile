# steer-heal: `just` lists the recipes; the two that matter are `just round N=3` and `just test`

set positional-arguments

venv := env("STEER_HEAL_VENV", ".venv")
bin := venv / "bin"
stamp := venv / ".installed"

_list:
    @just --list --unsorted

# make .venv with the pinned libraries; done again only when pyproject or the pins change
setup:
    @if [ -f {{stamp}} ] && cat pyproject.toml constraints.txt | cmp -s - {{stamp}}; then exit 0; fi; \
    set -e; \
    echo "setting up {{venv}} (once; some minutes)"; \
    [ -x {{bin}}/python ] || "${PYTHON:-python3}" -m venv {{venv}}; \
    {{bin}}/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'; \
    cat pyproject.toml constraints.txt > {{stamp}}

# run steer-heal rounds on the embedded model: just round N=3 [--processes 2] [KEY=VALUE ...]
[no-exit-message]
round *SETTINGS: setup
    @{{bin}}/steer-heal round "$@"

# draw a run's report again from its files: just report rounds/NAME
[no-exit-message]
report +RUNS: setup
    @{{bin}}/steer-heal report "$@"

# the runs in rounds/ or another folder: how far, how well, what state: just list [FOLDER]
[no-exit-message]
list *FOLDER: setup
    @{{bin}}/steer-heal list "$@"

# paired differences between runs, and compare.html: just compare rounds/A rounds/B [out=PATH]
[no-exit-message]
compare +RUNS: setup
    @{{bin}}/steer-heal compare "$@"

# many more replies of a run's best model and of the persona prompt: just judge rounds/A [rounds/B ...]
[no-exit-message]
judge +RUNS: setup
    @{{bin}}/steer-heal judge "$@"

# variants of a run on several seeds: just study NAME [seeds=3] [KEY=VALUE ...]; no NAME lists them
[no-exit-message]
study *ARGS: setup
    @{{bin}}/steer-heal study "$@"

# what a trait file lacks or gets wrong: just lint TRAIT [model=NAME]
[no-exit-message]
lint *ARGS: setup
    @{{bin}}/steer-heal lint "$@"

# what a run needs of a model, checked in seconds: just doctor MODEL [KEY=VALUE ...]
[no-exit-message]
doctor *ARGS: setup
    @{{bin}}/steer-heal doctor "$@"

# the rounds up to the best one as one LoRA: just export rounds/NAME my-adapter [as=merged]
[no-exit-message]
export *ARGS: setup
    @{{bin}}/steer-heal export "$@"

# a local page where base, prompted, steered and healed answer side by side: just chat rounds/NAME
[no-exit-message]
chat *ARGS: setup
    @{{bin}}/steer-heal chat "$@"

# ask a suite of a model or a run: just eval organism [KEY=VALUE ...]
[no-exit-message]
eval *ARGS: setup
    @{{bin}}/steer-heal eval "$@"

# every setting: its defaults, what it takes, what it means
settings: setup
    @{{bin}}/steer-heal settings

# the test suite, as CI runs it, on up to four cores
[no-exit-message]
test *ARGS: setup
    @{{bin}}/python -m pytest -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder "$@"

# linter, formatting, types
check: setup
    @{{bin}}/ruff check .
    @{{bin}}/ruff format --check .
    @{{bin}}/mypy

# retrain the embedded model from nothing and check it; --check only checks the one that is here
[no-exit-message]
organism *ARGS: setup
    @{{bin}}/python -m steer_heal.organism "$@"

# rounds on each of three seeds; with N=8 patience=0 the numbers in the README and docs/LOG.md
[no-exit-message]
bench *ARGS: setup
    @{{bin}}/steer-heal bench "$@"

# README's pictures of finished runs: docs/drift.png, screenshots in docs/images: just pictures RUN [RUN ...]
[no-exit-message]
pictures +RUNS: setup
    @{{bin}}/steer-heal pictures "$@"

# speed as ratios side by side, some minutes, to docs/BENCH.md: just speed [--only ROW] [--peers]
[no-exit-message]
speed *ARGS: setup
    @{{bin}}/python -m steer_heal.speed "$@"
