"""Lists of jobs answer exactly the question that was asked, or say which part of it they do not know."""

import pytest

JOBS = "/v1/fine_tuning/jobs"
on_both = pytest.mark.parametrize("database", ["sqlite", "postgres"], indirect=True)


@pytest.fixture
def body(world) -> dict:
    return {"model": world.base_model(), "training_file": world.file()}


@pytest.fixture
def made(client, body) -> dict[str, str]:
    """Jobs by the metadata they carry."""
    notes = {
        "none": None,
        "empty": {},
        "x": {"team": "x"},
        "x1": {"team": "x", "run": "1"},
        "odd": {"a b.c'\"[0]$é": "v=1&w"},
    }
    return {
        name: client.post(JOBS, json=body | {"metadata": metadata}).json()["id"]
        for name, metadata in notes.items()
    }


def listed(client, made, **query) -> set[str]:
    answer = client.get(JOBS, params=query)
    assert answer.status_code == 200, answer.text
    names = {identifier: name for name, identifier in made.items()}
    return {names[job["id"]] for job in answer.json()["data"]}


@on_both
def test_metadata(client, made):
    assert listed(client, made, **{"metadata[team]": "x"}) == {"x", "x1"}
    assert listed(client, made, **{"metadata[team]": "x", "metadata[run]": "1"}) == {"x1"}
    assert listed(client, made, **{"metadata[team]": "y"}) == set()
    assert listed(client, made, **{"metadata[no]": "x"}) == set()
    assert listed(client, made, **{"metadata[a b.c'\"[0]$é]": "v=1&w"}) == {"odd"}
    assert listed(client, made, metadata="null") == {"none"}
    assert listed(client, made, **{"metadata[team]": "x", "status": "running"}) == set()


@on_both
def test_pages_of_a_filtered_list(client, made):
    first = client.get(JOBS, params={"metadata[team]": "x", "limit": 1}).json()
    assert ([job["id"] for job in first["data"]], first["has_more"]) == ([made["x1"]], True)
    rest = client.get(JOBS, params={"metadata[team]": "x", "after": made["x1"]}).json()
    assert ([job["id"] for job in rest["data"]], rest["has_more"]) == ([made["x"]], False)


def test_method(client, made):
    assert listed(client, made, method="supervised") == set(made)
    assert listed(client, made, method="dpo") == set()


@pytest.mark.parametrize(
    ("query", "code", "param", "words"),
    [
        ("metadata=x", "invalid_value", "metadata", "null"),
        ("metadata[]=x", "unknown_parameter", "metadata[]", "Unknown"),
        ("statsu=queued", "unknown_parameter", "statsu", "Did you mean 'status'?"),
        ("order=asc", "unknown_parameter", "order", "Unknown parameter"),
        ("status=sleeping", "invalid_value", "status", "paused"),
        ("limit=0", "invalid_value", "limit", "greater"),
    ],
)
def test_what_is_not_known_is_refused(client, query, code, param, words):
    answer = client.get(f"{JOBS}?{query}")
    error = answer.json()["error"]
    assert (answer.status_code, error["code"], error["param"]) == (400, code, param)
    assert words in error["message"]


@pytest.mark.parametrize(
    ("more", "param", "words"),
    [
        ({"traning_file": "f"}, "traning_file", "Did you mean 'training_file'?"),
        ({"resources": {"nproc_per_nod": 1}}, "resources.nproc_per_nod", "Did you mean 'nproc_per_node'?"),
        (
            {"integrations": [{"type": "wandb", "wandb": {"project": "p", "tag": ["a"]}}]},
            "integrations.0.wandb.tag",
            "Did you mean 'tags'?",
        ),
        ({"zzz": 1}, "zzz", "Unknown parameter: 'zzz'."),
        (
            {"method": {"type": "supervised", "supervised": {"hyperparameters": {"n_epoch": 1}}}},
            "method.supervised.hyperparameters.n_epoch",
            "did you mean 'n_epochs'?",
        ),
    ],
)
def test_an_unknown_parameter_comes_with_the_nearest_known_one(client, body, more, param, words):
    answer = client.post(JOBS, json=body | more)
    error = answer.json()["error"]
    assert (answer.status_code, error["code"], error["param"]) == (400, "unknown_parameter", param)
    assert words in error["message"]
