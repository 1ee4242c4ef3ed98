"""/dashboard leads where the operator said, for everybody."""

import pytest
from fastapi.testclient import TestClient

from api.main import create_app


@pytest.mark.parametrize(
    ("said", "leads"),
    [
        (":8701", "http://testserver:8701/"),
        ("https://pages.hospital.test/r", "https://pages.hospital.test/r"),
    ],
)
def test_it_leads_there(world, said, leads):
    app = create_app(world.settings.model_copy(update={"dashboard_url": said}), world.database)
    answer = TestClient(app).get("/dashboard?next=https://evil.test", follow_redirects=False)
    assert (answer.status_code, answer.headers["location"]) == (307, leads)


def test_without_one_there_is_nothing(client):
    assert client.get("/dashboard", follow_redirects=False).status_code == 404


def test_what_is_no_address_is_refused(settings):
    with pytest.raises(ValueError, match="dashboard_url"):
        type(settings)(dashboard_url="javascript:alert(1)")
