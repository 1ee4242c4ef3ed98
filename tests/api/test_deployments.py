"""Deployments: what should answer, and whether it does."""

DEPLOYMENTS = "/v1/deployments"


def test_create_is_get_or_create(client, world):
    model = world.base_model()
    created = client.post(DEPLOYMENTS, json={"model": model})
    assert created.status_code == 200, created.text
    deployment = created.json()
    assert deployment["id"].startswith("dep-")
    assert isinstance(deployment["created_at"], int)
    expected = {"object": "deployment", "model": model, "status": "pending", "auto": False, "error": None}
    assert deployment.items() >= expected.items()
    assert client.post(DEPLOYMENTS, json={"model": model}).json() == deployment
    assert client.get(f"{DEPLOYMENTS}/{deployment['id']}").json() == deployment
    assert [item["id"] for item in client.get(DEPLOYMENTS).json()["data"]] == [deployment["id"]]


def test_only_admins_see_the_address(client, world, as_admin):
    deployment_id = world.deploy(world.base_model(), address="http://10.0.0.1:1")
    path = f"{DEPLOYMENTS}/{deployment_id}"
    shown = client.get(path).json()
    assert (shown["status"], shown["address"]) == ("ready", None)
    assert client.get(path, headers=as_admin).json()["address"] == "http://10.0.0.1:1"
    assert client.get(DEPLOYMENTS).json()["data"][0]["address"] is None


def test_a_failed_one_shows_why_and_is_tried_again(client, world):
    model = world.base_model()
    error = {"code": "engine_failed", "message": "The engine died 4 times."}
    deployment_id = world.deploy(model, status="failed", error=error)
    assert client.get(f"{DEPLOYMENTS}/{deployment_id}").json()["error"] == error
    again = client.post(DEPLOYMENTS, json={"model": model}).json()
    assert (again["id"], again["status"], again["error"]) == (deployment_id, "pending", None)


def test_delete(client, world):
    deployment_id = world.deploy(world.base_model())
    path = f"{DEPLOYMENTS}/{deployment_id}"
    expected = {"id": deployment_id, "object": "deployment", "deleted": True}
    assert client.delete(path).json() == expected
    assert client.delete(path).json() == expected
    assert client.get(path).json()["status"] == "stopped"
    fresh = client.post(DEPLOYMENTS, json={"model": "org/base"}).json()
    assert fresh["id"] != deployment_id


def test_refusals(client, as_admin):
    answer = client.post(DEPLOYMENTS, json={"model": "m"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "model_not_found")
    client.post("/v1/models/import", json={"id": "m", "source": "/s"}, headers=as_admin)
    answer = client.post(DEPLOYMENTS, json={"model": "m"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "model_not_ready")
    answer = client.post(DEPLOYMENTS, json={"model": "m", "replicas": 2})
    assert answer.json()["error"]["code"] == "unknown_parameter"
    assert client.get(f"{DEPLOYMENTS}/dep-x").status_code == 404
    assert client.delete(f"{DEPLOYMENTS}/dep-x").status_code == 404


def test_pages(client, world):
    ids = [world.deploy(world.base_model(f"m{number}")) for number in range(3)]
    page = client.get(f"{DEPLOYMENTS}?limit=2").json()
    assert ([item["id"] for item in page["data"]], page["has_more"]) == (ids[:0:-1], True)
    rest = client.get(f"{DEPLOYMENTS}?after={page['last_id']}").json()
    assert ([item["id"] for item in rest["data"]], rest["has_more"]) == (ids[:1], False)
