//! `mvm init`: a flake to begin with, with a manifest, one profile and one role of one's own.

use std::fs;
use std::path::{Path, PathBuf};

use clap::{Args, ValueEnum};
use mvm_types::Role;

use super::CliResult;
use super::args::role;
use super::exit::{CliError, Exit};
use super::open::{Globals, Intent, VmmChoice, open};
use super::progress::ProgressLines;
use crate::vm::pool::nix_manifest::MANIFEST_FILE;

/// The name that the templates have for a role.
const TEMPLATE_ROLE: &str = "hello";

/// The flake whose images are NixOS systems: the same as `nix flake init -t` takes.
const NIXOS: [(&str, &str); 4] = [
    ("flake.nix", include_str!("../../nix/template/flake.nix")),
    (MANIFEST_FILE, include_str!("../../nix/template/mvm-profiles.toml")),
    ("profiles/base.nix", include_str!("../../nix/template/profiles/base.nix")),
    ("roles/hello.nix", include_str!("../../nix/template/roles/hello.nix")),
];

/// The flake that needs no other: its images are put together from parts that lie beside it.
const PLAIN: [(&str, &str); 4] = [
    ("flake.nix", include_str!("../../examples/flake-without-inputs/flake.nix")),
    (MANIFEST_FILE, "[meta]\nversion = 1\n\n[profiles.plain]\nmodule = \"plain.nix\"\n\n[roles.hello]\nmodule = \"image.nix\"\n"),
    ("plain.nix", include_str!("../../examples/flake-without-inputs/plain.nix")),
    ("image.nix", include_str!("../../examples/flake-without-inputs/image.nix")),
];

/// Arguments of `mvm init`.
#[derive(Debug, Args)]
#[command(
    after_help = "Examples:\n  mvm init images --role cache\n  mvm init images --kind plain --role cache\n  mvm pool create acme/cache --role cache --profile plain --flake-ref path:$PWD/images\n\nNothing that is there is overwritten."
)]
pub struct InitArgs {
    /// Where the flake is written
    #[arg(default_value = ".", value_name = "DIR")]
    dir: PathBuf,
    /// The name of the role, which becomes yours
    #[arg(long, default_value = TEMPLATE_ROLE, value_parser = role)]
    role: Role,
    /// What its images are
    #[arg(long, default_value = "nixos", value_name = "KIND")]
    kind: Kind,
}

/// What a flake's images are.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Kind {
    /// NixOS systems, composed of modules
    Nixos,
    /// A kernel and a root file system that lie beside the flake: at first those of the built-in image
    Plain,
}

/// Writes a flake.
pub fn run(globals: &Globals, args: &InitArgs) -> CliResult {
    if args.role.is_built_in() {
        let text = format!("role {} is one of mvm's own; a role of your own has another name", args.role);
        return Err(CliError::new(Exit::Usage, text));
    }
    let files: Vec<(String, String)> = match args.kind {
        Kind::Nixos => named(&NIXOS, args.role),
        Kind::Plain => named(&PLAIN, args.role),
    };
    for there in files.iter().map(|(name, _)| args.dir.join(name)).chain((args.kind == Kind::Plain).then(|| args.dir.join("parts"))) {
        if there.symlink_metadata().is_ok() {
            return Err(CliError::new(Exit::Refused, format!("{} is there already; nothing was written", there.display())));
        }
    }
    if args.kind == Kind::Plain {
        copy_parts(globals, &args.dir.join("parts"))?;
    }
    for (name, content) in &files {
        let path = args.dir.join(name);
        write(&path, content)?;
    }
    let profile = if args.kind == Kind::Nixos { "base" } else { "plain" };
    let dir = std::path::absolute(&args.dir)?;
    eprintln!(
        "A flake with role {role} and profile {profile} is in {}. Next:\n  mvm pool create TENANT/POOL --role {role} --profile {profile} --flake-ref path:{}",
        dir.display(),
        dir.display(),
        role = args.role,
    );
    Ok(Exit::Done)
}

/// The files of a template with the role's name in the place of its own.
fn named(template: &[(&str, &str)], role: Role) -> Vec<(String, String)> {
    let module = |name: &str| format!("roles/{name}.nix");
    let rename = |text: &str| {
        let text = text.replace(&module(TEMPLATE_ROLE), &module(role.as_str()));
        text.replace(&format!("[roles.{TEMPLATE_ROLE}]"), &format!("[roles.{role}]"))
    };
    template.iter().map(|(name, content)| (rename(name), rename(content))).collect()
}

fn write(path: &Path, content: &str) -> Result<(), CliError> {
    let failed = |error: std::io::Error| CliError::new(Exit::Failed, format!("{}: {error}", path.display()));
    if let Some(parent) = path.parent() {
        fs::create_dir_all(parent).map_err(failed)?;
    }
    fs::write(path, content).map_err(failed)
}

/// Puts the parts of the built-in image where a plain flake looks for its own.
fn copy_parts(globals: &Globals, parts: &Path) -> Result<(), CliError> {
    if globals.vmm == VmmChoice::Simulated {
        return Err(CliError::new(Exit::Refused, "a simulated node has no image to take the parts of"));
    }
    let opened = open(globals, Intent::Change)?;
    let lines = ProgressLines::new();
    let bar = lines.spin("built-in image");
    let image = opened.node.throwaway_image(&|text| {
        if let Some(bar) = &bar {
            bar.set_message(format!("built-in image: {text}"));
        }
    })?;
    if let Some(bar) = bar {
        bar.finish_and_clear();
    }
    fs::create_dir_all(parts).map_err(|error| CliError::new(Exit::Failed, format!("{}: {error}", parts.display())))?;
    let copy = |from: &Path, name: &str| {
        let to = parts.join(name);
        fs::copy(from, &to).map(drop).map_err(|error| CliError::new(Exit::Failed, format!("{}: {error}", to.display())))
    };
    copy(&image.kernel, "vmlinux")?;
    if let Some(initrd) = &image.initrd {
        copy(initrd, "initrd")?;
    }
    copy(&image.rootfs, "rootfs")?;
    let vmm =
        serde_json::json!({ "version": 1, "kernel_args": image.kernel_args, "min_mem_mib": image.min_mem_mib, "root_format": "ext4" });
    write(&parts.join("vmm.json"), &format!("{vmm:#}\n"))?;
    opened.close()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::vm::pool::nix_manifest::NixManifest;

    #[test]
    fn a_flake_has_the_role_by_its_name() {
        for (template, profile) in [(&NIXOS, "base"), (&PLAIN, "plain")] {
            let dir = tempfile::tempdir().unwrap();
            for (name, content) in named(template, "cache".parse().unwrap()) {
                write(&dir.path().join(name), &content).unwrap();
            }
            let manifest = NixManifest::load(dir.path()).unwrap().unwrap();
            let resolved = manifest.resolve("cache".parse().unwrap(), &profile.parse().unwrap()).unwrap();
            assert_eq!(resolved.attribute, format!("tenant-cache-{profile}"));
            assert!(manifest.roles.keys().all(|role| role.as_str() == "cache"));
        }
    }
}
