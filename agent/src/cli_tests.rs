//! Tests of the command line: what parses, what is refused, and that no help text is forgotten.

use std::path::Path;
use std::time::Duration;

use clap::{CommandFactory, Parser};

use super::{Cli, Command};
use crate::config::Role;
use crate::exit::ExitCode;
use crate::layout::Layout;

fn parse(line: &str) -> Result<Cli, clap::Error> {
    Cli::try_parse_from(line.split_whitespace())
}

#[test]
fn definitions_are_sound() {
    Cli::command().debug_assert();
}

#[test]
fn every_command_has_an_example_and_its_exit_codes() {
    let mut root = Cli::command();
    let help = root.render_long_help().to_string();
    assert!(help.contains(&ExitCode::table()), "{help}");
    let mut seen = 0;
    for command in root.get_subcommands_mut().filter(|command| command.get_name() != "help") {
        seen += 1;
        let help = command.render_long_help().to_string();
        let name = command.get_name().to_owned();
        assert!(help.contains("Examples:\n  ") && help.contains(&format!("twinbox {name}")), "{name}:\n{help}");
        assert!(help.contains("  0  done"), "{name}:\n{help}");
    }
    assert_eq!(seen, 17);
}

#[test]
fn commands() {
    let cli = parse("twinbox mirror a b --once --adopt --exclude *.bak --exclude x/ --layout mdbox -q").expect("valid");
    assert!(cli.global.quiet);
    let Command::Mirror(mirror) = cli.command else { panic!("not mirror") };
    assert!(mirror.once && mirror.adopt && !mirror.json);
    assert_eq!((mirror.layout, mirror.exclude.len()), (Layout::Mdbox, 2));

    let line = "twinbox init --config c --node mail1 --role primary --mirror mail=/srv/a=b --listen 127.0.0.1:1 --state s";
    let Command::Init(init) = parse(line).expect("valid").command else { panic!("not init") };
    assert_eq!(init.role, Role::Primary);
    assert_eq!(init.mirror[0].root, Path::new("/srv/a=b"));
    assert_eq!(init.file.config, Path::new("c"));

    let Command::Pair(pair) = parse("twinbox pair --config c --expires 2 twinbox-pair:x").expect("valid").command else {
        panic!("not pair")
    };
    assert_eq!(pair.lifetime(), Duration::from_secs(120));
    assert_eq!(pair.code.as_deref(), Some("twinbox-pair:x"));

    for line in [
        "twinbox demo --seconds 3 --keep",
        "twinbox run --config c --adopt mail --log-level debug",
        "twinbox reload --config c",
        "twinbox heal --config c --mirror mail --timeout 10m --force --json",
        "twinbox status --config c --json --watch",
        "twinbox compare a b --json --layout maildir",
    ] {
        assert!(parse(line).is_ok(), "{line}");
    }
}

#[test]
fn refusals_end_with_the_usage_code_and_say_what_to_write() {
    for (line, said) in [
        ("twinbox mirror a", "<DST>"),
        ("twinbox mirror a b --layout maildri", "did you mean `maildir`?"),
        ("twinbox mirror a b --exclude [", "never closed"),
        ("twinbox miror a b", "mirror"),
        ("twinbox demo --seconds 0", "1..=86400"),
        ("twinbox init --node n --role primary --mirror mail", "write NAME=ROOT"),
        ("twinbox init --node n --role primary --mirror MAIL=/x", "is no mirror name"),
        ("twinbox init --node n --role boss --mirror m=/x", "primary, standby"),
        ("twinbox init --node n --role primary", "--mirror <NAME=ROOT>"),
    ] {
        let error = parse(line).expect_err(line);
        assert_eq!(error.exit_code(), i32::from(ExitCode::Usage.code()), "{line}");
        assert!(error.to_string().contains(said), "{line}: {error}");
    }
}
