from __future__ import annotations

import datetime

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes

from hbone.errors import IdentityError
from hbone.identity import RevocationLists
from hbone.testing.ca import TestCa

ROOT = TestCa()
MIDDLE = ROOT.intermediate()
LEAF = MIDDLE.svid("shop", "web").leaf
OTHER = MIDDLE.svid("shop", "api").leaf
PATH = (LEAF, MIDDLE.certificate, ROOT.certificate)

NAMESAKE = TestCa()
NAMESAKE.subject = MIDDLE.subject
"""Another CA that calls itself as ours does."""


@pytest.mark.parametrize(
    ("lists", "revoked"),
    [
        pytest.param([], None, id="no lists"),
        pytest.param([MIDDLE.crl(LEAF)], LEAF, id="leaf, by its intermediate's list"),
        pytest.param([ROOT.crl(MIDDLE.certificate)], MIDDLE.certificate, id="intermediate"),
        pytest.param([MIDDLE.crl(LEAF), ROOT.crl(MIDDLE.certificate)], LEAF, id="both: the leaf is named"),
        pytest.param([MIDDLE.crl(LEAF, ttl=-1)], LEAF, id="a list past its nextUpdate"),
        pytest.param([MIDDLE.crl(), MIDDLE.crl(LEAF)], LEAF, id="the second list of one CA"),
        pytest.param([MIDDLE.crl(OTHER), ROOT.crl()], None, id="others were revoked"),
        pytest.param([ROOT.crl(LEAF)], None, id="leaf, by a CA that did not issue it"),
        pytest.param([ROOT.crl(ROOT.certificate)], None, id="the root: roots are taken out of the bundle"),
        pytest.param([NAMESAKE.crl(LEAF)], None, id="a CA of the same name"),
        pytest.param([NAMESAKE.crl(LEAF), MIDDLE.crl(LEAF)], LEAF, id="a CA of the same name, and ours"),
    ],
)
def test_a_path_is_looked_up_whole(
    lists: list[x509.CertificateRevocationList], revoked: x509.Certificate | None
) -> None:
    found = RevocationLists(lists).find(PATH)
    assert (None if found is None else found.certificate) == revoked
    assert bool(RevocationLists(lists)) == bool(lists)


def test_what_was_found_names_serial_and_issuer() -> None:
    found = RevocationLists([MIDDLE.crl(LEAF)]).find(PATH)
    assert f"{LEAF.serial_number:x}" in str(found)
    assert MIDDLE.subject.rfc4514_string() in str(found)


def odd(extension: x509.ExtensionType) -> x509.CertificateRevocationList:
    now = datetime.datetime.now(datetime.UTC)
    builder = x509.CertificateRevocationListBuilder(ROOT.subject, now, now + datetime.timedelta(hours=1))
    return builder.add_extension(extension, critical=True).sign(ROOT.key, hashes.SHA256())


@pytest.mark.parametrize(
    ("extension", "word"),
    [
        (x509.DeltaCRLIndicator(1), "delta"),
        (
            x509.IssuingDistributionPoint(
                full_name=[x509.UniformResourceIdentifier("http://x/")],
                relative_name=None,
                only_contains_user_certs=False,
                only_contains_ca_certs=False,
                only_some_reasons=None,
                indirect_crl=True,
                only_contains_attribute_certs=False,
            ),
            "indirect",
        ),
    ],
)
def test_a_list_that_would_be_misunderstood_is_refused(extension: x509.ExtensionType, word: str) -> None:
    with pytest.raises(IdentityError, match=f"^an? {word} revocation list cannot be used"):
        RevocationLists([odd(extension)])
