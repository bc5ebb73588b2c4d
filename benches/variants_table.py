#!/usr/bin/env python3
"""Prints what `variants_3b.py` measured, a JSON file that it wrote with `--out`, as tables in Markdown."""

import json
import sys

STAGES = ("patch_features", "image_embeds", "logits")


def table(head, rows):
    print(f"| {' | '.join(head)} |\n|{'---|' * len(head)}")
    for row in rows:
        print(f"| {' | '.join(map(str, row))} |")
    print()


def gigabytes(number):
    return f"{number / 1e9:.2f} GB" if number else "-"


def exports(results):
    for result in results:
        took = result["export"]
        yield (
            ", ".join(f"`{variant}`" for variant in result["variants"]),
            f"{took['wall_s']:.0f} s",
            f"{took['cpu_s']:.0f} s",
            gigabytes(took["peak_rss"]),
            gigabytes(took["peak_anonymous"]),
            gigabytes(result.get("bytes")),
            f"{took['load_before']}, {took['load_after']}",
        )


def graphs(results):
    for result in results:
        for name, found in result.get("graphs", {}).get("found", {}).items():
            if "failed" in found:
                yield result["package"], f"`{name}`", found["failed"], "", "", "", ""
                continue
            yield (
                f"`{name}`",
                f"{found['checker']}, {found['inference']}",
                found["nodes"],
                found["most_axes"],
                ", ".join(found["varying"]) or "none",
                found["unknown_sizes"],
                found["without_shape"],
            )


def self_checks(results):
    for result in results:
        for variant, check in result.get("self_checks", {}).items():
            doctor, mapped = check.get("doctor"), check.get("mapped")
            took = (mapped or doctor)["took"]
            found = distances(doctor, mapped)
            yield (
                f"`{variant}`",
                "weights mapped" if mapped else "engine",
                *(f"{found[stage][0]:.1e} ({found[stage][1]:.2g})" if stage in found else "-" for stage in STAGES),
                f"{took['wall_s']:.0f} s, {took['cpu_s']:.0f} s",
                gigabytes(took["peak_rss"]),
                gigabytes(took["peak_anonymous"]),
                gigabytes(planned(doctor)),
            )


def distances(doctor, mapped):
    """The distance and the tolerance of each stage."""
    if mapped:
        return {stage: (at["distance"], at["tolerance"]) for stage, at in (mapped["distances"] or {}).items()}
    found = {}
    for component in doctor["components"]:
        for agreement in component["self_check"]:
            # The decoder's are several: after the prompt, and after tokens that are read one by one.
            name = next((stage for stage in STAGES if stage.split("_")[0] in agreement["what"]), "logits")
            far = agreement["distance"] if agreement["distance"] is not None else float("inf")
            found[name] = max(found.get(name, (0, 0)), (far, agreement["tolerance"]))
    return found


def planned(doctor):
    """Anonymous memory by the engine's plan, unless the plan is for components that other variants serve."""
    if not doctor or not doctor["memory"]:
        return None
    parts = {part["component"]: part["variant"] for part in doctor["memory"]["parts"]}
    served = doctor["components"] if isinstance(doctor["components"], list) else []
    other = any(parts.get(component["component"]) != component["variant"] for component in served)
    return None if other else doctor["memory"]["anonymous"]


def placements(results):
    for result in results:
        for variant, check in result.get("self_checks", {}).items():
            components = (check.get("doctor") or {}).get("components")
            if isinstance(components, dict):
                yield f"`{variant}`", "-", "-", components["error"]
                continue
            for component in components or []:
                nodes = (component["placement"] or {}).get("nodes", {})
                yield (
                    f"`{variant}`",
                    component["component"],
                    f"`{component['variant']}` on {component['provider']}",
                    ", ".join(f"{count} nodes on {provider}" for provider, count in nodes.items()),
                )


def main():
    with open(sys.argv[1], encoding="utf-8") as file:
        results = list(json.load(file).values())
    table(["variant", "wall", "processor", "peak RSS", "anonymous", "package", "load before, after"], exports(results))
    checked = "checker, inference"
    head = ["graph", checked, "nodes", "most axes", "sizes that vary", "unknown sizes", "values without shape"]
    table(head, dict.fromkeys(graphs(results)))
    head = ["variant", "run by", *(stage.replace("_", " ") + " (allowed)" for stage in STAGES)]
    table([*head, "wall, processor", "peak RSS", "anonymous", "plan's anonymous"], self_checks(results))
    table(["variant", "component", "served by", "placement"], placements(results))


if __name__ == "__main__":
    main()
