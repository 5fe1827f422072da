//! `twinbox init`: writes a commented configuration and makes the node's key.

use std::path::PathBuf;

use crate::cli::Init;
use crate::config::{Config, DEFAULT_SWEEP, Limits, Log, Mirror};
use crate::exit::ExitCode;
use crate::failure::Failure;
use crate::net::NodeKey;

fn absolute(path: &PathBuf) -> Result<PathBuf, Failure> {
    std::path::absolute(path).map_err(|error| Failure::io(&path.display().to_string(), &error))
}

/// Runs the command.
///
/// # Errors
/// [`Failure`]; an existing configuration is never touched.
pub fn run(args: &Init, quiet: bool) -> Result<ExitCode, Failure> {
    let state = absolute(&args.state)?;
    let mut mirrors = vec![];
    for mirror in &args.mirror {
        mirrors.push(Mirror {
            name: mirror.name.clone(),
            root: absolute(&mirror.root)?,
            layout: args.layout,
            role: args.role,
            groups: vec![],
            exclude: vec![],
            sweep_interval: DEFAULT_SWEEP,
            fuzzy_after: None,
        });
    }
    let config = Config {
        node: args.node.clone(),
        state: state.clone(),
        listen: vec![args.listen],
        limits: Limits::default(),
        fence: None,
        hooks: crate::hooks::Hooks::default(),
        verify: crate::config::Verify::default(),
        log: Log::default(),
        mirrors,
        peers: vec![],
    };
    // What would be refused when read is refused before it is written.
    Config::parse(&config.to_toml())?;
    let file = &args.file.config;
    if let Some(parent) = file.parent().filter(|p| !p.as_os_str().is_empty()) {
        std::fs::create_dir_all(parent).map_err(|error| Failure::io(&parent.display().to_string(), &error))?;
    }
    if file.exists() {
        // create_file would say so too, but then the key below is made first.
        config.create_file(file)?;
    }
    use std::os::unix::fs::DirBuilderExt;
    std::fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(&state)
        .map_err(|error| Failure::io(&format!("state directory {}", state.display()), &error))?;
    let key = NodeKey::load_or_create(&state.join("node.key"))?;
    config.create_file(file)?;
    if !quiet {
        println!("Wrote {}; this node's key is {}.", file.display(), key.fingerprint());
        println!("Next: `twinbox pair --config {}` on one node, and the code it prints on the other.", file.display());
    }
    Ok(ExitCode::Ok)
}
