"""The commands `cachedattn store ...`: look at a store root, check it, clean it.

Knows options, tables and progress bars. The work is in `store.audit`, which is imported
when a command needs it. `ls`, `stats`, `verify` and `export` may run beside an engine;
`gc` and `rm` need the lock of a local root.
"""

import datetime
import json
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from cachedattn_jax.exit_codes import exit_codes

if TYPE_CHECKING:
    from cachedattn_jax.store.audit import Audit

Item = TypeVar("Item")

store_app = typer.Typer(
    no_args_is_help=True,
    help="Look at a store root, verify it, clean it, export from it.",
)

Url = Annotated[str, typer.Argument(metavar="URL", help="A folder, s3://, gs://.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON and no progress.")]
Secret = Annotated[
    str | None,
    typer.Option("--tenant_secret_file", help="As in StoreConfig.tenant_secret_file."),
]
Tenant = Annotated[str | None, typer.Option("--tenant", help="Only of this tenant.")]
DryRun = Annotated[bool, typer.Option("--dry_run", help="Only say what would go.")]


@store_app.command()
def ls(
    url: Url,
    tenant: Tenant = None,
    as_json: AsJson = False,
    secret: Secret = None,
) -> None:
    """List sessions: turns, tokens, pages stored of those needed, last use."""
    with exit_codes(), _audit(url, secret) as audit:
        stored = set(audit.pages())
        names = audit.sessions(tenant)
        rows: list[dict[str, Any]] = []
        for name in _progress(names, "reading records", as_json):
            record = audit.record(*name)
            row: dict[str, Any] = {"tenant": name[0], "session": name[1]}
            if record is not None:
                pages = audit.pages_of(record)
                row |= {
                    "turns": record.num_turns,
                    "tokens": len(record.token_ids),
                    "pages": len(pages),
                    "pages_stored": len(stored.intersection(pages)),
                    "used_at": _moment(record.used_at),
                }
            rows.append(row | {"is_damaged": record is None})
        if as_json:
            typer.echo(json.dumps(rows, indent=1))
            return
        columns = ("tenant", "session", "turns", "tokens", "pages_stored", "pages")
        _print_table(f"{len(rows)} sessions", (*columns, "used_at"), rows)


@store_app.command()
def stats(url: Url, as_json: AsJson = False, secret: Secret = None) -> None:
    """Count sessions, pages and bytes by tenant, and say whose layout it is."""
    with exit_codes(), _audit(url, secret) as audit:
        sessions = Counter(tenant for tenant, _ in audit.sessions())
        pages = Counter(_tenant_of(name) for name in audit.pages())
        tenants = [
            {
                "tenant": tenant,
                "sessions": sessions[tenant],
                "pages": pages[tenant],
                "bytes": pages[tenant] * audit.object_bytes,
            }
            for tenant in sorted(sessions.keys() | pages.keys())
        ]
        found = {
            "sessions": sessions.total(),
            "pages": pages.total(),
            "bytes": pages.total() * audit.object_bytes,
            "object_bytes": audit.object_bytes,
            "quarantined": len(audit.quarantined()),
            "layout": audit.layout.describe(),
            "tenants": tenants,
        }
        if as_json:
            typer.echo(json.dumps(found, indent=1))
            return
        console = Console(highlight=False)
        for name in ("sessions", "pages", "bytes", "object_bytes", "quarantined"):
            console.print(f"{name}: {found[name]:,}")
        console.print(f"layout: {found['layout']}")
        _print_table("Tenants", ("tenant", "sessions", "pages", "bytes"), tenants)


@store_app.command()
def verify(
    url: Url,
    repair: Annotated[
        bool, typer.Option("--repair", help="Move bad pages to quarantine/.")
    ] = False,
    as_json: AsJson = False,
    secret: Secret = None,
) -> None:
    """Read every object whole and check it; exits with 1 if one is bad."""
    with exit_codes(), _audit(url, secret, is_writing=repair) as audit:
        names = audit.pages()
        findings = audit.verify(names)
        bad = [
            finding
            for finding in _progress(findings, "verifying", as_json, len(names))
            if finding.reason is not None
        ]
        damaged = [n for n in audit.sessions() if audit.record(*n) is None]
        if repair:
            for finding in bad:
                audit.quarantine(finding)
        rows = [{"object": f.name, "reason": f.reason} for f in bad]
        rows += [{"object": f"{t}/{s}", "reason": "record"} for t, s in damaged]
        if as_json:
            found = {"pages": len(names), "bad": rows}
            typer.echo(json.dumps(found, indent=1))
        else:
            done = "moved to quarantine" if repair else "bad"
            title = f"{len(names)} pages read, {len(rows)} {done}"
            _print_table(title, ("object", "reason"), rows)
    if rows and not repair:
        raise typer.Exit(1)


@store_app.command()
def gc(
    url: Url,
    dry_run: DryRun = False,
    quarantine: Annotated[
        bool, typer.Option("--quarantine", help="Empty quarantine/, too.")
    ] = False,
    as_json: AsJson = False,
    secret: Secret = None,
) -> None:
    """Delete page objects that no session goes on from.

    A page of a turn that has not ended yet counts as such in a shared root; deleting it
    costs a recomputation and nothing else.
    """
    with exit_codes(), _audit(url, secret, is_writing=not dry_run) as audit:
        orphans: list[str] = []
        with _bar(as_json) as bar:
            task = bar.add_task("reading records", total=None)
            for done, total, found in audit.orphans():
                bar.update(task, completed=done, total=total)
                orphans += found
        quarantined = audit.quarantined() if quarantine else []
        _remove(audit, [*orphans, *quarantined], dry_run, as_json)


@store_app.command()
def rm(
    url: Url,
    tenant: Annotated[str, typer.Option("--tenant")] = "default",
    session: Annotated[
        str | None,
        typer.Option("--session", help="One session; without it the whole tenant."),
    ] = None,
    everything: Annotated[
        bool, typer.Option("--all", help="Erase all sessions of the tenant.")
    ] = False,
    dry_run: DryRun = False,
    as_json: AsJson = False,
    secret: Secret = None,
) -> None:
    """Delete a session, or erase a tenant: records, pages, quarantined objects."""
    with exit_codes():
        if (session is None) != everything:
            raise ValueError("name a --session, or --all for the whole tenant")
        with _audit(url, secret, is_writing=not dry_run) as audit:
            if session is None:
                names = audit.names_of_tenant(tenant)
            else:
                names = audit.names_of_session(tenant, session)
            _remove(audit, names, dry_run, as_json)


@store_app.command()
def export(
    url: Url,
    session: Annotated[str, typer.Option("--session")],
    output: Annotated[Path, typer.Option("--output", help="A new folder.")],
    tenant: Annotated[str, typer.Option("--tenant")] = "default",
    as_json: AsJson = False,
    secret: Secret = None,
) -> None:
    """Write a session's keys and values as a zarr3 array for other tools.

    [tokens, layers, kv_heads, 2 (K, V), head_dim] in float32. Keys are rotated by their
    offset inside their page only; the attributes have the page size and the tokens.
    """
    with exit_codes(), _audit(url, secret) as audit:
        from cachedattn_jax.store.export import export_session

        steps = export_session(audit, tenant, session, output)
        total = next(steps)
        for _ in _progress(steps, "exporting pages", as_json, total):
            pass
        if as_json:
            typer.echo(json.dumps({"output": str(output), "pages": total}))
        else:
            typer.echo(f"{total} pages are in {output}, a zarr3 array.")


def _audit(url: str, secret: str | None, *, is_writing: bool = False) -> "Audit":
    from cachedattn_jax.store.audit import Audit
    from cachedattn_jax.store.objects.salts import read_salts

    return Audit(url, salts=read_salts(secret), is_writing=is_writing)


def _remove(audit: "Audit", names: list[str], dry_run: bool, as_json: bool) -> None:
    if not dry_run:
        for name in _progress(names, "deleting", as_json):
            audit.remove(name)
    found = {"objects": len(names), "is_dry_run": dry_run}
    if as_json:
        typer.echo(json.dumps({**found, "names": names}, indent=1))
    else:
        typer.echo(f"{len(names)} objects {'would go' if dry_run else 'deleted'}")


def _bar(as_json: bool) -> Progress:
    return Progress(console=Console(stderr=True), disable=as_json, transient=True)


def _progress(
    items: Iterable[Item], what: str, as_json: bool, total: int | None = None
) -> Iterator[Item]:
    with _bar(as_json) as bar:
        if total is None and isinstance(items, list):
            total = len(items)
        yield from bar.track(items, total=total, description=what)


def _print_table(title: str, columns: Iterable[str], rows: list[dict]) -> None:
    table = Table(title=title, title_justify="left")
    for column in columns:
        table.add_column(column)
    for row in rows:
        table.add_row(*[str(row.get(column, "damaged")) for column in columns])
    Console(highlight=False).print(table)


def _moment(seconds: float) -> str:
    moment = datetime.datetime.fromtimestamp(seconds, datetime.UTC)
    return moment.isoformat(timespec="seconds")


def _tenant_of(name: str) -> str:
    import urllib.parse

    return urllib.parse.unquote(name.split("/")[1])
