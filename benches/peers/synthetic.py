"""A made run with known ratios, for the tests of the report."""

CONTENDERS = (("llava-phi-cpu-int4", True), ("genai", False), ("llama-q4_0", False))


def record(values, rounds=7):
    """`values` by contender and figure are functions of the round."""
    samples = [
        {"contender": contender, "round": number, "figure": figure, "value": value(number), "disturbed": False}
        for contender, figures in values.items()
        for figure, value in figures.items()
        for number in range(rounds)
    ]
    return {
        "schema": 1,
        "date": "2026-01-02T03:04:05+00:00",
        "options": {"rounds": rounds, "threads": 2, "disturbed": 0.05},
        "machine": {
            "processor": "A processor",
            "instructions": ["avx2"],
            "processors": 2,
            "memory": 24_000_000_000,
            "system": "A system",
        },
        "versions": {"onnxruntime": "1.32.0"},
        "contenders": [
            {"name": name, "title": f"title of {name}", "why": f"why {name}", "ours": ours}
            for name, ours in CONTENDERS
            if name in values
        ],
        "runs": [{"busy": 0.01}, {"busy": 0.2}],
        "samples": samples,
        "left_out": [],
    }


def noisy(value):
    """A machine that is slower in some rounds, for everybody alike."""
    return lambda number: value * (1 + 0.3 * (number % 3))
