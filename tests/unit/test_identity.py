"""What makes two runs the same: each domain is compared with itself."""

from mllm_keeplora.data import Domain
from mllm_keeplora.identity import Identity

FILES = {"train": "train.json", "test": "test.json", "scorer": "exact"}


def identity(**digests: str) -> Identity:
    """An identity whose domains are graded by files with these digests."""
    files = {key: field.default for key, field in Domain.model_fields.items() if not field.is_required()} | FILES
    domains = [{"name": name, "files": files, "sha256": {"test": own}} for name, own in digests.items()]
    return Identity({}, None, tuple(domains), (), None)


def test_one_domain_with_other_answers_does_not_speak_for_the_others():
    before, now = identity(Alpha="1", Beta="1", Gamma="1"), identity(Alpha="1", Beta="1", Gamma="2")
    assert before.graded_like(now) == {"Alpha", "Beta"}
