"""Makes the numeric files beside it from their published sources. Knows no workload.

python experiments/traces/make_traces.py LENGTHS.csv TRACE.jsonl LINKED.jsonl
"""

import csv
import gzip
import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

HERE = Path(__file__).parent
ROLES = {"system": 0, "human": 1, "gpt": 2}


def write_table(path: Path, header: str, rows: Iterable[Sequence[int]]) -> None:
    """Writes a gzip'ed CSV whose bytes depend on its numbers only."""
    text = "\n".join([header, *(",".join(map(str, row)) for row in rows)]) + "\n"
    path.write_bytes(gzip.compress(text.encode(), compresslevel=9, mtime=0))


def sampled_lengths(path: Path) -> list[tuple[int, ...]]:
    """conversation, message, role, tokens; ids of people's conversations go."""
    conversations: dict[str, int] = {}
    rows: dict[tuple[int, int], tuple[int, ...]] = {}
    with path.open(newline="") as file:
        for row in csv.DictReader(file):
            number = conversations.setdefault(row["conversation"], len(conversations))
            message = int(row["msg_index"])
            # One message lies in two chunks of its conversation.
            rows[number, message] = (
                number,
                message,
                ROLES[row["role"]],
                int(row["n_tok_llama2"]),
            )
    return sorted(rows.values())


def requests(trace: Path, linked: Path) -> list[tuple[int, ...]]:
    """session, t_ms, input_tokens, output_tokens, like_row, shared_blocks."""
    session_of = {
        turn["row"]: session["session"]
        for session in map(json.loads, linked.read_text().splitlines())
        for turn in session["turns"]
    }
    rows, maker, num_blocks = [], {}, 0
    for number, line in enumerate(trace.read_text().splitlines()):
        request = json.loads(line)
        ids = request["hash_ids"]
        shared = sum(block < num_blocks for block in ids)
        # What the compact form takes for granted: new blocks are numbered on, and
        # the others are the beginning of the row that brought the last of them.
        assert ids[shared:] == list(range(num_blocks, num_blocks + len(ids) - shared))
        assert len(ids) == -(-request["input_length"] // 512)
        like = maker[ids[shared - 1]] if shared else 0
        maker.update((block, number) for block in ids[shared:])
        num_blocks += len(ids) - shared
        rows.append(
            (
                session_of[number],
                request["timestamp"],
                request["input_length"],
                request["output_length"],
                like,
                shared,
            )
        )
    return rows


if __name__ == "__main__":
    lengths_csv, trace_jsonl, linked_jsonl = map(Path, sys.argv[1:])
    write_table(
        HERE / "sharegpt_lengths.csv.gz",
        "conversation,message,role,tokens",
        sampled_lengths(lengths_csv),
    )
    write_table(
        HERE / "mooncake_requests.csv.gz",
        "session,t_ms,input_tokens,output_tokens,like_row,shared_blocks",
        requests(trace_jsonl, linked_jsonl),
    )
