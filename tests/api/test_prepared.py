"""Prepared data, as admins see it."""

import json
import os


def test_admins_see_what_is_prepared_and_how_long_it_stays(client, settings, as_admin):
    folder = settings.cache_dir / "tokenized" / ("a" * 64)
    folder.mkdir(parents=True)
    info = json.dumps({"bytes": 0, "counts": {"used": 3, "tokens": 21}})
    (folder / "info.json").write_text(info)
    os.utime(folder, (1_700_000_000, 1_700_000_000))
    answer = client.get("/v1/prepared", headers=as_admin)
    assert answer.json() == {
        "object": "list",
        "data": [
            {
                "id": "a" * 64,
                "object": "prepared_data",
                "bytes": len(info),
                "rows": 3,
                "tokens": 21,
                "used_at": 1_700_000_000,
                "expires_at": 1_700_000_000 + int(settings.prepared_unused_s),
            }
        ],
    }
    assert client.get("/v1/prepared").status_code == 403
