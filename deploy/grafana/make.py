"""Writes deploy/grafana/tidings.json: `python deploy/grafana/make.py`. By hand it would be 1,200 lines of positions."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
N = '{job=~"$job",node=~"$node"}'
# Panels are three in a row of 24.
WIDTH, HEIGHT = 8, 8
OK = {"lineWidth": 1, "fillOpacity": 8, "showPoints": "never"}


def rate(metric: str) -> str:
    return f"rate({metric}{N}[$__rate_interval])"


def quantile(q: float, metric: str, by: str = "") -> str:
    labels = f"le,{by}" if by else "le"
    return f"histogram_quantile({q}, sum by ({labels}) ({rate(metric + '_bucket')}))"


def mean(metric: str) -> str:
    return f"sum by (node) ({rate(metric + '_sum')}) / sum by (node) ({rate(metric + '_count')})"


# Row -> panels: title, what it tells, unit, expressions with their legends.
ROWS: dict[str, list[tuple[str, str, str, list[tuple[str, str]]]]] = {
    "People": [
        ("Sessions", "Authenticated, by transport.", "short", [
            (f"sum by (node, transport) (tidings_sessions{N})", "{{node}} {{transport}}"),
        ]),
        ("Connections and users", "Sockets that are open, and people behind them, on all nodes.", "short", [
            (f"sum(tidings_connections{N})", "connections"), (f"sum(tidings_users{N})", "users, per node"),
        ]),
        ("Closed by the server", "Why connections were ended, by code.", "cps", [
            (f"sum by (code) ({rate('tidings_closes_total')})", "{{code}}"),
        ]),
    ],
    "Messages": [
        ("Sends over sockets", "By outcome. `repeated` are retries, and harmless.", "cps", [
            (f"sum by (outcome) ({rate('tidings_sends_total')})", "{{outcome}}"),
        ]),
        ("A send, from frame to answer", "As a client sees it, without the network.", "s", [
            (quantile(0.5, "tidings_send_seconds"), "p50"), (quantile(0.99, "tidings_send_seconds"), "p99"),
        ]),
        ("Fan-out", "Events written to sockets, and how many for each event that was sent.", "cps", [
            (f"sum by (node) ({rate('tidings_deliveries_total')})", "{{node}}"),
        ]),
        ("A commit with its fsync", "Every send waits for one.", "s", [
            (quantile(0.5, "tidings_commit_seconds", "node"), "{{node}} p50"),
            (quantile(0.99, "tidings_commit_seconds", "node"), "{{node}} p99"),
        ]),
        ("Messages in one commit", "Grows with the load: then a commit costs each of them less.", "short", [
            (mean("tidings_append_batch_size"), "{{node}}"),
        ]),
        ("Frames in one write", "Grows when sockets get more than one frame in a tick.", "short", [
            (mean("tidings_flush_frames"), "{{node}}"),
        ]),
    ],
    "Readers": [
        ("Behind", "Sessions that read from the log, and connections that take less than they are sent.", "short", [
            (f"sum by (node) (tidings_behind{N})", "{{node}} behind"),
            (f"sum by (node) (tidings_paused{N})", "{{node}} paused"),
        ]),
        ("The furthest behind", "Events that somebody has still to read.", "short", [
            (f"max by (node) (tidings_behind_events{N})", "{{node}}"),
        ]),
        ("Read from the log", "Events for devices that catch up, and readers put behind.", "cps", [
            (f"sum by (node) ({rate('tidings_catch_up_events_total')})", "{{node}} events"),
            (f"sum by (node) ({rate('tidings_slow_readers_total')})", "{{node}} put behind"),
        ]),
    ],
    "Requests": [
        ("REST requests", "By status.", "reqps", [
            (f"sum by (status) ({rate('tidings_rest_requests_total')})", "{{status}}"),
        ]),
        ("REST, time to answer", "p99 of the slowest routes.", "s", [
            (f"topk(8, {quantile(0.99, 'tidings_rest_request_seconds', 'route')})", "{{route}}"),
        ]),
        ("Commands that waited", "By type. Sends decided from memory and pings are not among them.", "cps", [
            (f"sum by (type) ({rate('tidings_commands_total')})", "{{type}}"),
        ]),
        ("Refused", "Credentials by code, and what was over a limit.", "cps", [
            (f"sum by (code) ({rate('tidings_auth_refused_total')})", "{{code}}"),
            (f"sum by (limit) ({rate('tidings_rate_limited_total')})", "over the limit of {{limit}}"),
        ]),
        ("Our errors", "Should be nothing at all.", "cps", [
            (f"sum by (where) ({rate('tidings_internal_errors_total')})", "{{where}}"),
        ]),
        ("Store", "Whether it answers, and how long one row takes.", "s", [
            (quantile(0.99, "tidings_store_probe_seconds", "node"), "{{node}} p99"),
            (f"min by (node) (tidings_store_up{N})", "{{node}} up"),
        ]),
    ],
    "Bus": [
        ("Connected", "1 while other nodes can be heard and told. Without, messages come seconds later.", "short", [
            (f"min by (node) (tidings_bus_connected{N})", "{{node}}"),
        ]),
        ("Notices", "Told, heard, and what could not be told.", "cps", [
            (f"sum by (node) ({rate('tidings_bus_published_total')})", "{{node}} told"),
            (f"sum by (node) ({rate('tidings_bus_received_total')})", "{{node}} heard"),
            (f"sum by (node) ({rate('tidings_bus_dropped_total')})", "{{node}} dropped"),
        ]),
        ("Found in the store", "Streams whose growth was not heard, and losses of the bus.", "cps", [
            (f"sum by (node) ({rate('tidings_bus_healed_total')})", "{{node}} healed"),
            (f"sum by (node) ({rate('tidings_bus_reconnects_total')})", "{{node}} reconnects"),
        ]),
        ("To the bus and back", "The last round trip.", "s", [
            (f"max by (node) (tidings_bus_round_trip_seconds{N})", "{{node}}"),
        ]),
        ("Interests", "Subjects that a node listens to.", "short", [
            (f"sum by (node) (tidings_bus_interests{N})", "{{node}}"),
        ]),
    ],
    "Behind the scenes": [
        ("Jobs that wait", "By kind. Lanes of an endpoint that fails wait here, too.", "short", [
            (f"max by (kind) (tidings_jobs_waiting{N})", "{{kind}}"),
            (f"max by (kind) (tidings_jobs_dead{N})", "{{kind}} given up"),
        ]),
        ("Overdue", "For how long the oldest due job has been waiting.", "s", [
            (f"max by (kind) (tidings_jobs_overdue_seconds{N})", "{{kind}}"),
        ]),
        ("Jobs done", "Events handed on, and jobs by how they ended.", "cps", [
            (f"sum by (kind, outcome) ({rate('tidings_jobs_ended_total')})", "{{kind}} {{outcome}}"),
            (f"sum({rate('tidings_outbox_rows_total')})", "events handed on"),
        ]),
        ("How long a job takes", "And how much of their room jobs get: less while many messages are sent.", "s", [
            (quantile(0.99, "tidings_job_seconds", "kind"), "{{kind}} p99"),
            (f"min by (node) (tidings_jobs_share{N})", "{{node}} share"),
        ]),
        ("Webhooks", "Attempts by outcome, and endpoints that were switched off.", "cps", [
            (f"sum by (outcome) ({rate('tidings_webhook_deliveries_total')})", "{{outcome}}"),
            (f"sum by (reason) ({rate('tidings_webhooks_disabled_total')})", "switched off: {{reason}}"),
        ]),
        ("Pushes", "Decisions and attempts by reason, and set-ups that a provider refused.", "cps", [
            (f"sum by (outcome, reason) ({rate('tidings_pushes_total')})", "{{outcome}} {{reason}}"),
            (f"sum by (provider) ({rate('tidings_push_misconfigured_total')})", "{{provider}} misconfigured"),
        ]),
        ("Before sending", "What apps made of messages, and how long they took.", "cps", [
            (f"sum by (outcome) ({rate('tidings_presend_total')})", "{{outcome}}"),
            (quantile(0.99, "tidings_presend_seconds", "node"), "{{node}} p99, s"),
        ]),
    ],
    "Nodes": [
        ("Processor", "One node uses one core.", "percentunit", [
            (f"sum by (node) ({rate('process_cpu_seconds_total')})", "{{node}}"),
        ]),
        ("Memory", "Resident.", "bytes", [(f"sum by (node) (process_resident_memory_bytes{N})", "{{node}}")]),
        ("Event loop", "How late timers fire: what everything on a node waits for.", "s", [
            (quantile(0.99, "tidings_event_loop_stall_seconds", "node"), "{{node}} p99"),
            (f"max by (node) (tidings_event_loop_lag_seconds{N})", "{{node}} last"),
        ]),
        ("Open files", "Of those that are allowed.", "percentunit", [
            (f"process_open_fds{N} / process_max_fds{N}", "{{node}}"),
        ]),
        ("Streams listened to", "Each costs memory on the node and interest on the bus.", "short", [
            (f"sum by (node) (tidings_streams{N})", "{{node}}"),
        ]),
        ("Versions and drains", "More than one version during an upgrade only.", "short", [
            (f"count by (version) (tidings_info{N})", "{{version}}"),
            (f"sum(tidings_draining{N})", "draining"),
        ]),
    ],
}  # fmt: skip


def dashboard() -> dict[str, Any]:
    """What Grafana imports."""
    panels: list[dict[str, Any]] = []
    top = 0
    for row, made in ROWS.items():
        panels.append({"type": "row", "title": row, "collapsed": False, "gridPos": at(0, top, 24, 1), "panels": []})
        top += 1
        for place, (title, tells, unit, expressions) in enumerate(made):
            panels.append(
                {
                    "type": "timeseries",
                    "title": title,
                    "description": tells,
                    "datasource": {"type": "prometheus", "uid": "${source}"},
                    "gridPos": at(WIDTH * (place % 3), top + HEIGHT * (place // 3), WIDTH, HEIGHT),
                    "fieldConfig": {"defaults": {"unit": unit, "min": 0, "custom": OK}, "overrides": []},
                    "options": {"legend": {"displayMode": "list", "placement": "bottom"}, "tooltip": {"mode": "multi"}},
                    "targets": [
                        {"refId": chr(65 + number), "expr": expression, "legendFormat": legend}
                        for number, (expression, legend) in enumerate(expressions)
                    ],
                }
            )
        top += HEIGHT * ((len(made) + 2) // 3)
    for number, panel in enumerate(panels, 1):
        panel["id"] = number
    return {
        "title": "Tidings",
        "uid": "tidings",
        "tags": ["tidings"],
        "schemaVersion": 39,
        "editable": True,
        "refresh": "30s",
        "time": {"from": "now-3h", "to": "now"},
        "templating": {
            "list": [
                {"name": "source", "label": "Prometheus", "type": "datasource", "query": "prometheus"},
                variable("job", "label_values(tidings_info, job)"),
                variable("node", 'label_values(tidings_info{job=~"$job"}, node)'),
            ]
        },
        "panels": panels,
    }


def at(x: int, y: int, w: int, h: int) -> dict[str, int]:
    return {"x": x, "y": y, "w": w, "h": h}


def variable(name: str, query: str) -> dict[str, Any]:
    return {
        "name": name,
        "type": "query",
        "datasource": {"type": "prometheus", "uid": "${source}"},
        "query": {"query": query, "refId": name},
        "refresh": 2,
        "includeAll": True,
        "multi": True,
        "allValue": ".*",
        "current": {"text": "All", "value": "$__all"},
    }


def text() -> str:
    return json.dumps(dashboard(), indent=1, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    sys.exit(not (HERE / "tidings.json").write_text(text(), encoding="utf-8"))
