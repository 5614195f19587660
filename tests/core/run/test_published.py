"""What cards do not say: folders of the machine, and secrets."""

import pytest

from treetune.core.run import published


@pytest.mark.parametrize(
    "text,said",
    [
        ("model: /nfs/models/llama\ndata:\n- /data/me/rows.jsonl\n", "model: llama\ndata:\n- rows.jsonl\n"),
        ("/srv/ann/runs/a/", "a"),
        ("\n~/models/x, '/srv/b/c.txt' (/a/b)", "\nx, 'c.txt' (b)"),
        (r"model: C:\Users\ann\llama", "model: llama"),
        ("me/data and https://host/a/b?x=/c, layers/0", "me/data and https://host/a/b?x=/c, layers/0"),
        ("1/2 or / or /think", "1/2 or / or /think"),
        ("http://ann:pw@host:80/v1", "http://***@host:80/v1"),
        ("use hf_abcdefghijklmnopqrstuv.", "use ***."),
        ("comet_experiment_config:\n- api_key=abcdef123456\n- tag=a", "comet_experiment_config:\n- api_key=***\n- tag=a"),
        ("key: s3cr3t-value-of-env; keys: 3, max_token: 5", "key: ***; keys: 3, max_token: 5"),
    ],
)
def test_folders_and_secrets_are_left_out(text, said, monkeypatch):
    monkeypatch.setenv("MY_SERVICE_API_KEY", "s3cr3t-value-of-env")
    assert published.cleared({"a": [text, 1, None]}) == {"a": [said, 1, None]}
