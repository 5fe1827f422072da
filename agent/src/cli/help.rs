//! The long help: an example that can be pasted, and how the command ends.

use crate::exit::ExitCode as Exit;

/// Below `twinbox -h`.
pub(super) const SHORT: &str = "First time here? `twinbox demo`. More, with examples and exit codes: `twinbox COMMAND --help`.";

/// Below `twinbox --help`.
pub(super) fn long() -> String {
    format!(
        "\
Examples:
  See it work, nothing to set up:
    twinbox demo
  Mirror a store on this machine:
    twinbox mirror /srv/mail /backup/mail
  Two machines:
    mail1# twinbox init --node mail1 --role primary --mirror mail=/srv/mail
    mail2# twinbox init --node mail2 --role standby --mirror mail=/srv/mail
    mail1# twinbox pair                    (prints a code and waits)
    mail2# twinbox pair twinbox-pair:…     (the code from mail1)
    both#  systemctl enable --now twinbox  (or: twinbox run)
    both#  twinbox status

{}",
        Exit::table()
    )
}

pub(super) fn demo() -> String {
    sections(
        "
  twinbox demo
  twinbox demo --seconds 5 --keep",
        &[Exit::Ok, Exit::Failure, Exit::Differs, Exit::Io, Exit::Watches, Exit::Interrupted],
    )
}

pub(super) fn mirror() -> String {
    sections(
        "
  twinbox mirror /srv/mail /backup/mail
  twinbox mirror --once ~/Maildir /mnt/usb/Maildir && echo in sync
  twinbox mirror --layout mdbox --exclude '*.bak' /srv/mail /backup/mail

Works as an ordinary user too: then ownership of other users' files is not kept, and files they hold
open are watched less strictly. The status says so.
Ctrl-C drains what is under way and prints a summary; started again, it goes on where it stopped.",
        &[
            Exit::Ok,
            Exit::Failure,
            Exit::Usage,
            Exit::BadPath,
            Exit::State,
            Exit::Differs,
            Exit::Io,
            Exit::Watches,
            Exit::Permission,
            Exit::Interrupted,
        ],
    )
}

pub(super) fn init() -> String {
    sections(
        "
  mail1# twinbox init --node mail1 --role primary --mirror mail=/srv/mail
  mail2# twinbox init --node mail2 --role standby --mirror mail=/srv/mail --layout mdbox

Never overwrites a configuration. The key (mode 0600) stays in the state directory and never leaves it.
Next: `twinbox pair` on one node.",
        &[Exit::Ok, Exit::Usage, Exit::Config, Exit::BadPath, Exit::Io, Exit::Permission],
    )
}

pub(super) fn pair() -> String {
    sections(
        "
  mail1# twinbox pair                  prints twinbox-pair:… and waits
  mail2# twinbox pair twinbox-pair:…   both now know each other's key and address

Pass the code on by a channel you trust: it is good once, until it expires. Nothing else gets a node in.
If this node is behind NAT or has several addresses, name the ones to use with --address.",
        &[Exit::Ok, Exit::Usage, Exit::Config, Exit::State, Exit::Listen, Exit::Peer, Exit::Interrupted],
    )
}

pub(super) fn heal() -> String {
    sections(
        "
  twinbox heal
  twinbox heal --timeout 10m || echo the standby is needed
  systemctl enable twinbox-heal        (packaging/twinbox-heal.service: runs it before the mail server)

The standby can have mail that this machine's disk lost when its power was cut. After an orderly stop, or
when only the agent was killed, there is nothing to do and nobody is asked. Meant for a mail server that
is not running. What was changed here after the last transaction is never overwritten; where that cannot
be told, both versions are kept and the message says where. May be repeated, and interrupted. While
paths cannot be put back it ends with 15, and nothing is shipped: --force-incomplete does without them.",
        &[
            Exit::Ok,
            Exit::Failure,
            Exit::Usage,
            Exit::Config,
            Exit::BadPath,
            Exit::State,
            Exit::Listen,
            Exit::Peer,
            Exit::Io,
            Exit::Permission,
            Exit::Unhealed,
            Exit::Interrupted,
        ],
    )
}

pub(super) fn run() -> String {
    sections(
        "
  twinbox run --config /etc/twinbox/twinbox.toml
  systemctl enable --now twinbox       (packaging/twinbox.service)

After a power cut it first does what `twinbox heal` does; until that is done nothing is shipped.
SIGTERM and Ctrl-C drain and stop; SIGHUP reads the configuration again. Tells systemd when it is ready.",
        &[Exit::Ok, Exit::Failure, Exit::Config, Exit::BadPath, Exit::State, Exit::Listen, Exit::Io, Exit::Watches, Exit::Permission],
    )
}

const SWITCHED: &[Exit] = &[Exit::Ok, Exit::Failure, Exit::Usage, Exit::Config, Exit::NoAgent, Exit::Permission, Exit::Refused];

pub(super) fn promote() -> String {
    sections(
        "
  mail2# twinbox promote               mail1 is gone: mail2 takes over
  mail2# systemctl start dovecot postfix

Make sure first that the other machine is off, or that nobody reaches its mail server: two servers that
take mail at the same time are two histories, and one of them will have to go to rescue. Refused while the
primary is connected, and while the first sync is not complete: --force goes on all the same, with a
replica that is at no point in time. Everything that was acknowledged is there when this ends.
When the old primary is back: `twinbox resync plan` there.",
        SWITCHED,
    )
}

pub(super) fn demote() -> String {
    sections(
        "
  The halves of `twinbox switchover`, one by one:
    mail1# systemctl stop postfix dovecot
    mail1# twinbox demote
    mail2# twinbox promote
    mail2# systemctl start dovecot postfix
  A machine that was primary when it died is back, and nothing of it is to be merged (else: `twinbox resync`):
    mail1# twinbox demote --force

Refused unless the standby has everything: nothing may write to the store any more. With --force this
node gives up: it compares all of its files with the other node, and what that one lacks, or has another
version of, is kept in rescue/ in the state directory.",
        SWITCHED,
    )
}

pub(super) fn switchover() -> String {
    sections(
        "
  mail1# twinbox switchover            mail1 is primary: mail2 takes over

Runs the hook pre_demote here (which stops the mail server), waits until everything is on the other node,
gives up the role, has the other node take it (its hooks start the mail server there), and ends when that
is done. Refused, and the mail server is started again, when no standby follows or something still writes
to the store: --force goes on all the same, and what was written after the last transaction is kept in
rescue/ in the state directory.",
        &[Exit::Ok, Exit::Failure, Exit::Usage, Exit::Config, Exit::NoAgent, Exit::Peer, Exit::Permission, Exit::Refused],
    )
}

pub(super) fn resync() -> String {
    sections(
        "
  mail1 died, mail2 was promoted, mail1 is back (it has stepped down by itself):
    mail1# twinbox resync plan           what is on mail1 alone, and what would become of it
    mail1# twinbox resync apply          does it: mail1 is a standby in sync
  Both were promoted apart; mail2 is to stay:
    mail1# twinbox resync plan --winner mail2

The mail server on this node is stopped. Messages that only this node has are put into the other one's
store, as if they had just come; flags and folders that only this node changed are changed there, too.
Deletions are not repeated: mail comes back rather than vanishes. Whatever else this node has alone is
kept in rescue/ in the state directory. A report says what became of each.",
        &[
            Exit::Ok,
            Exit::Failure,
            Exit::Usage,
            Exit::Config,
            Exit::NoAgent,
            Exit::Peer,
            Exit::Permission,
            Exit::Refused,
            Exit::Interrupted,
        ],
    )
}

pub(super) fn verify() -> String {
    sections(
        "
  twinbox verify                       reads everything this node keeps, and tells what differs
  twinbox verify --repair --rate 50M
  twinbox verify --json | jq '.mirrors[].findings'

Each node compares its own disk with the manifest, of which both have the same: run it on both. What differs
is looked at twice more before it is told. --repair: on a standby every path becomes what the manifest says;
on a primary, too, where the disk has changed by itself (the file's change time says that nobody did), while
a change that nobody had seen is sent to the standby. Contents come from the node that has them; whatever
gives way is kept in rescue. Ctrl-C stops it; the next run goes on there. [verify] in the configuration has
it done regularly. Ends with 9 while differences are left.",
        &[
            Exit::Ok,
            Exit::Failure,
            Exit::Usage,
            Exit::Config,
            Exit::NoAgent,
            Exit::Differs,
            Exit::Permission,
            Exit::Refused,
            Exit::Interrupted,
        ],
    )
}

pub(super) fn rescue() -> String {
    sections(
        "
  twinbox rescue list
  twinbox rescue show mail/1792310400-resync/anna/Maildir/new/1792310111.M5.mail1
  twinbox rescue redeliver --all
  twinbox rescue restore --to /root mail/1792310400-resync/anna/Maildir/sieve
  twinbox rescue purge --older-than 90d

Whatever gives way to another version, after a failback, a power cut or a change on a standby, is kept in
the state directory of the node it was on. Nothing of it is removed but by purge. What is given back never
replaces anything: a message that is in its folder already is left out, a place that is taken stays as it
is. restore and redeliver leave the file in rescue.",
        &[Exit::Ok, Exit::Failure, Exit::Usage, Exit::Config, Exit::NoAgent, Exit::Peer, Exit::Io, Exit::Permission, Exit::Refused],
    )
}

pub(super) fn reload() -> String {
    sections(
        "
  twinbox reload

A wrong configuration is refused and the old one stays in force. What needs a restart is named.",
        &[Exit::Ok, Exit::Failure, Exit::Config, Exit::NoAgent, Exit::Permission],
    )
}

pub(super) fn status() -> String {
    sections(
        "
  twinbox status
  twinbox status --watch
  twinbox status --json | jq '.mirrors[] | {name, state, bound_ms}'

Read the second line of each mirror first: \"standby is at LSN n, at most t behind, m changes pending\".
PROTECTED: a standby follows. UNPROTECTED: what changes now exists once. Lines with `!` need you.",
        &[Exit::Ok, Exit::Config, Exit::NoAgent, Exit::Permission],
    )
}

pub(super) fn fence() -> String {
    sections(
        "
  twinbox fence                        everything, of every mirror this node is primary of
  twinbox fence /srv/mail/anna && echo it is on two machines
  twinbox fence --timeout 500ms /srv/mail/anna/Maildir/new

Covers every change below the paths whose system call had returned before the command began. The running
agent must be reachable: root or its own user. Programs speak to its socket, see docs/admin-protocol.md.",
        &[
            Exit::Ok,
            Exit::Failure,
            Exit::Usage,
            Exit::Config,
            Exit::BadPath,
            Exit::NoAgent,
            Exit::Permission,
            Exit::NotInTime,
            Exit::Unprotected,
        ],
    )
}

pub(super) fn txn() -> String {
    sections(
        "
  twinbox txn begin /srv/mail/anna     prints a number
  …change several files…
  twinbox txn commit /srv/mail/anna    they arrive together; ends when they are on two machines

A transaction that is not committed in its time is over: its changes are sent as they are, and a late
commit fails.",
        &[
            Exit::Ok,
            Exit::Failure,
            Exit::Usage,
            Exit::Config,
            Exit::BadPath,
            Exit::NoAgent,
            Exit::Permission,
            Exit::NotInTime,
            Exit::Unprotected,
        ],
    )
}

pub(super) fn compare() -> String {
    sections(
        "
  twinbox compare /srv/mail /backup/mail
  twinbox compare --layout maildir --json /srv/mail /backup/mail | head

Reads both trees in full. Meant for trees at rest: what changes meanwhile is reported as a difference.",
        &[Exit::Ok, Exit::Usage, Exit::BadPath, Exit::Differs, Exit::Io, Exit::Permission],
    )
}

fn sections(examples: &str, codes: &[Exit]) -> String {
    format!("Examples:{examples}\n\n{}", Exit::lines(codes))
}
