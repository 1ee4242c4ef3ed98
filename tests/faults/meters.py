"""What /metrics says of a running service: all that whoever watches it looks at (G36)."""

import httpx
from prometheus_client.parser import text_string_to_metric_families

from tests.stack import CERTIFICATES, METRICS_TOKEN, Stack, wait_for

SHOWN_WITHIN_S = 60.0


def read(stack: Stack, name: str, **labels: str) -> float:
    """The sum of the samples of a metric that have these labels."""
    answer = httpx.get(
        stack.url.removesuffix("/v1") + "/metrics",
        headers={"authorization": f"Bearer {METRICS_TOKEN}"},
        timeout=60,
        trust_env=False,
        verify=CERTIFICATES,
    )
    assert answer.status_code == 200, answer.text
    return sum(
        sample.value
        for family in text_string_to_metric_families(answer.text)
        for sample in family.samples
        if sample.name == f"residency_{name}" and labels.items() <= sample.labels.items()
    )


def wait_until_shown(stack: Stack, name: str, value: float, **labels: str) -> None:
    """Until a metric has a value, or more where it is a total."""
    wait_for(
        lambda: (
            read(stack, name, **labels) >= value
            if name.endswith("_total")
            else read(stack, name, **labels) == value
        ),
        within_s=SHOWN_WITHIN_S,
        what=f"{name} to show it",
    )
