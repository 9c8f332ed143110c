from __future__ import annotations

import json
from random import Random

import pytest
from kademlia.node import Node

from peerd.protocol.addresses import Multiaddr
from peerd.protocol.identity import Identity
from peerd.routing.dht.table import QUIET_S, Contact, ContactTable, PeerNode, dump_contacts, load_contacts

ADDRESS = Multiaddr.parse("/ip4/10.0.0.1/tcp/31330/ws")


def node(number: int) -> PeerNode:
    return PeerNode(Contact(Identity.from_seed(number.to_bytes(32, "big")).peer_id, (ADDRESS,)))


def full_table(count: int, ksize: int = 20) -> ContactTable:
    table = ContactTable(node(0), ksize, lambda: 0.0)
    for number in range(1, count + 1):
        table.add_contact(node(number))
    return table


def test_neighbours_are_the_nearest_there_are() -> None:
    table = full_table(300)
    random = Random(7)
    for _ in range(50):
        target = Node(random.randbytes(20))
        nearest = sorted(table, key=target.distance_to)[:20]
        assert [found.id for found in table.find_neighbors(target)] == [wanted.id for wanted in nearest]


def test_the_asking_peer_is_not_told_about_itself() -> None:
    table = full_table(10)
    asking = node(3)
    found = table.find_neighbors(asking, exclude=PeerNode(Contact(asking.contact.peer_id)))
    assert asking.id not in {neighbour.id for neighbour in found}
    assert len(found) == 9


def test_near_ranges_are_known_better_than_far_ones() -> None:
    table = full_table(500, ksize=4)
    own = node(0)
    near = sorted((node(number) for number in range(1, 501)), key=own.distance_to)[:4]
    assert {found.id for found in near} <= {found.id for found in table}
    assert len(table) < 200


def test_a_contact_that_was_silent_for_long_is_pinged_once() -> None:
    now = 0.0
    table = ContactTable(node(0), 20, lambda: now)
    for number in range(1, 6):
        table.add_contact(node(number))
    now = QUIET_S - 1
    table.add_contact(node(2))
    assert table.take_suspects() == []
    now = QUIET_S
    assert {suspect.id for suspect in table.take_suspects()} == {node(number).id for number in (1, 3, 4, 5)}
    assert table.take_suspects() == []
    table.remove_contact(node(1))
    for number in (3, 4, 5):
        table.add_contact(node(number))
    now = 2 * QUIET_S - 1
    assert [suspect.id for suspect in table.take_suspects()] == [node(2).id]


def test_a_full_range_keeps_its_old_peers_and_doubts_the_one_unheard_of_for_longest() -> None:
    table = full_table(500, ksize=4)
    suspects = table.take_suspects()
    assert suspects
    assert table.take_suspects() == []
    suspect = suspects[0]
    before = len(table)
    table.remove_contact(suspect)
    # The peer that waited for the place has it now.
    assert suspect not in table
    assert len(table) == before


def test_a_peer_that_leaves_is_no_longer_doubted() -> None:
    table = full_table(5)
    table.suspect(node(3))
    table.suspect(node(99))
    table.remove_contact(node(3))
    assert table.take_suspects() == []


def test_a_peer_heard_again_with_other_addresses_is_known_by_those() -> None:
    table = full_table(5)
    moved = Contact(node(3).contact.peer_id, (Multiaddr.parse("/ip4/10.9.9.9/tcp/1/ws"),))
    table.add_contact(PeerNode(moved))
    found = table.get(node(3).id)
    assert found is not None
    assert found.contact == moved
    assert len(table) == 5


def test_ranges_grow_lonely_by_the_given_clock() -> None:
    now = 0.0
    table = ContactTable(node(0), 4, lambda: now)
    for number in range(1, 60):
        table.add_contact(node(number))
    now = 3601.0
    assert table.lonely_buckets() == table.buckets
    table.touch(node(5))
    assert len(table.lonely_buckets()) == len(table.buckets) - 1


def test_contacts_read_back_as_written() -> None:
    contacts = [node(1).contact, Contact(node(2).contact.peer_id)]
    assert load_contacts(dump_contacts(contacts)) == contacts


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "null",
        '{"version": 1}',
        '{"version": 2, "contacts": []}',
        '{"version": 1, "contacts": [3]}',
        '{"version": 1, "contacts": [{"peer_id": "12D3KooW", "addresses": []}]}',
        '{"version": 1, "contacts": [{"peer_id": 5, "addresses": []}]}',
        json.dumps({"version": 1, "contacts": [{"peer_id": node(1).contact.peer_id, "addresses": ["/ip4/1.2.3.4"]}]}),
        json.dumps({"version": 1, "contacts": [{"peer_id": node(1).contact.peer_id, "addresses": [4]}]}),
    ],
)
def test_a_damaged_list_of_contacts_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="not a list of contacts"):
        load_contacts(text)
