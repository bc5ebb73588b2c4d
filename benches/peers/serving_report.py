"""Writes the tables of a run of servers in Markdown from its raw data: `serving_report.py serving.json` prints them again."""

import json
import sys
from pathlib import Path

import stats
from report import SMALL_SAMPLE, gb, section


def report(record):
    """The whole note on `record`, which `serving.py` wrote."""
    samples = sampled(record)
    parts = [head(record, samples)]
    for workload in dict.fromkeys(level["workload"] for level in record["levels"]):
        parts += [values(record, samples, workload), ratios(record, samples, workload)]
    parts += [memory(record), settings(record), trouble(record)]
    return "\n\n".join(part for part in parts if part) + "\n"


def sampled(record):
    """Seconds a token of each level that everybody answered, in the form that `stats` compares."""
    found = []
    for level in record["levels"]:
        if any(answer["error"] for answer in level["answers"]):
            continue
        said = sum(answer["tokens"] for answer in level["answers"])
        disturbed = level["busy"] is not None and level["busy"] > record["options"]["disturbed"]
        sample = {"contender": level["server"], "figure": figure(level), "round": level["round"]}
        found.append({**sample, "value": level["seconds"] / said, "disturbed": disturbed})
    return found


def figure(level):
    return f"{level['workload']}-{level['clients']}"


def title(workload, options):
    """What a workload is, in words."""
    prompt, tokens, picture = (options[name] for name in ("prompt", "tokens", "picture_tokens"))
    return {
        "text": f"Text: prompts of their own, {prompt} tokens, and {tokens} new ones",
        "picture-new": f"A picture that nobody knows, asked about by all at once: {picture} new tokens",
        "picture": f"The same picture, asked about before: {picture} new tokens",
    }[workload]


def head(record, samples):
    machine, options = record["starts"][0]["machine"], record["options"]
    busy = [level["busy"] for level in record["levels"] if level["busy"] is not None]
    rounds = {level["round"] for level in record["levels"]}
    lines = ["# Servers of LLaVA-Phi-3B with random weights, interleaved", ""]
    lines.append(
        f"{machine['processor']}, {machine['processors']} processors ({', '.join(machine['instructions'])}),"
        f" {gb(machine['memory'])} of memory, {machine['system']}."
    )
    for start in record["starts"]:
        versions = ", ".join(f"{name} {version}" for name, version in start["versions"].items())
        lines += ["", f"{start['date']}: `{start['command']}`; {versions}."]
    lines += [
        "",
        f"{len(rounds)} rounds, {options['threads']} threads each, greedy, the end forbidden, all servers loaded at once and"
        " those that are not asked stopped. Each client asks when it was answered. Tokens a second are the medians of"
        " rounds, waits and prompts included; waits are of all rounds' answers together. Ratios are geometric means of"
        " paired rounds with 95 % bootstrap intervals; those of fewer than"
        f" {SMALL_SAMPLE} rounds have intervals too narrow to be believed, and are marked *.",
    ]
    if busy:
        lines.append(
            f"Others took {100 * min(busy):.0f} to {100 * max(busy):.0f} % of the machine during a level, the clients"
            f" not counted; a level counts as disturbed above {100 * options['disturbed']:.0f} %, and † marks what was"
            " taken from disturbed ones."
        )
    return "\n".join(lines)


def values(record, samples, workload):
    rows = []
    for server in record["servers"]:
        levels = [one for one in record["levels"] if one["workload"] == workload and one["server"] == server["name"]]
        fewest = min((level["clients"] for level in levels), default=None)
        for clients in sorted({level["clients"] for level in levels}):
            of = [level for level in levels if level["clients"] == clients]
            answers = [answer for level in of for answer in level["answers"]]
            good = [answer for answer in answers if not answer["error"]]
            typical = stats.typical(samples, f"{workload}-{clients}", server["name"])
            rows.append([server["title"], str(clients), ""])
            if typical:
                rows[-1][2] = f"{1 / typical[0]:.1f}" + ("†" if typical[1] else "")
            more = None
            if clients > fewest:
                more = gain(samples, server["name"], f"{workload}-{clients}", f"{workload}-{fewest}")
            rows[-1] += [ratio_cell(more) if more else ""]
            rows[-1] += [waits([one["first"] for one in good if one["first"] is not None], "s")]
            rows[-1] += [waits([wait for one in good for wait in one["between"]], "ms")]
            prompts = sorted({one["prompt_tokens"] for one in good if one["prompt_tokens"] is not None})
            rows[-1] += ["-".join(str(end) for end in dict.fromkeys([*prompts[:1], *prompts[-1:]]))]
            rows[-1] += [f"{len(answers) - len(good)} of {len(answers)}"]
    columns = ["server", "clients", "tokens/s in all", "of one client", "first token, p50 / p95"]
    columns += ["between tokens, p50 / p95", "prompt", "errors"]
    return section(title(workload, record["options"]), columns, rows)


def gain(samples, server, many, one):
    """How many times the tokens a second of `one` a server has with `many`, round by round, and whether disturbed."""
    pairs = [[stats.of_rounds(samples, name, server, disturbed) for name in (one, many)] for disturbed in (False, True)]
    clean, everything = pairs
    paired, undisturbed = (len(a.keys() & b.keys()) for a, b in (everything, clean))
    chosen, disturbed = (clean, False) if 2 * undisturbed >= paired > 0 else (everything, True)
    ratio = stats.ratio(*chosen)
    return (ratio, disturbed) if ratio else None


def ratios(record, samples, workload):
    """Of ours and each peer: how many times as many tokens a second we give."""
    peers = [server for server in record["servers"] if not server["ours"]]
    rows = []
    for ours in (server for server in record["servers"] if server["ours"]):
        for clients in sorted({one["clients"] for one in record["levels"] if one["workload"] == workload}):
            name = f"{workload}-{clients}"
            best = stats.best_peer(samples, name, [peer["name"] for peer in peers])
            if best is None or stats.typical(samples, name, ours["name"]) is None:
                continue
            cells = [against(samples, name, ours["name"], peer["name"]) for peer in peers]
            marked = [f"**{cell}**" if peer["name"] == best else cell for peer, cell in zip(peers, cells)]
            rows.append([f"{ours['title']}, {clients} client{'s' * (clients > 1)}", *marked])
    table = section("", ["tokens/s, times those of", *(peer["title"] for peer in peers)], rows)
    return table.removeprefix("## \n\n")


def against(samples, name, ours, peer):
    ratio, disturbed = stats.compared(samples, name, ours, peer)
    return ratio_cell((ratio.inverse(), disturbed)) if ratio else ""


def ratio_cell(found):
    ratio, disturbed = found
    marks = ("*" if ratio.rounds < SMALL_SAMPLE else "") + ("†" if disturbed else "")
    return f"{ratio.mean:.2f} x ({ratio.low:.2f}-{ratio.high:.2f}){marks}"


def waits(values, unit):
    """`0.12 / 0.30 s`: the middle and the tail."""
    if not values:
        return ""
    ordered = sorted(values)
    ends = [ordered[min(len(ordered) - 1, int(q * len(ordered)))] for q in (0.5, 0.95)]
    if unit == "ms":
        return " / ".join(f"{1000 * end:.0f}" for end in ends) + " ms"
    return " / ".join(f"{end:.2f}" for end in ends) + " s"


def memory(record):
    rows = []
    for server in record["servers"]:
        of = [one for one in record["memory"] if one["server"] == server["name"] and "rss-peak" in one]
        loads = [one["seconds"] for one in record["loads"] if one["server"] == server["name"]]
        if of:
            cells = [f"{max(one[name] for one in of) / 1e6:,.0f} MB" for name in ("rss-peak", "rss-anonymous")]
            rows.append([server["title"], *cells, f"{min(loads):.1f} s"])
    return section("Memory", ["server", "peak RSS of all", "anonymous at the end", "start to ready"], rows)


def settings(record):
    rows = [[server["title"], server["why"]] for server in record["servers"]]
    return section("Settings", ["server", "settings, and what it does not do"], rows)


def trouble(record):
    titles = {server["name"]: server["title"] for server in record["servers"]}
    rows = []
    for entry in record["left_out"]:
        where = (
            f"{entry['workload']}, {entry['clients']} clients, round {entry['round']}" if "workload" in entry else "all"
        )
        rows.append([titles[entry["server"]], where, entry["reason"]])
    errors = {}
    for level in record["levels"]:
        for answer in level["answers"]:
            if answer["error"]:
                key = (titles[level["server"]], f"{level['workload']}, {level['clients']} clients", answer["error"])
                errors[key] = errors.get(key, 0) + 1
    rows += [[server, where, f"{count} x {error}"] for (server, where, error), count in errors.items()]
    return section("Left out, and errors", ["server", "of what", "reason"], rows)


if __name__ == "__main__":
    print(report(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))), end="")
