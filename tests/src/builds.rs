//! What is built before the rig runs: the driver domain's image, dom0's tool, the helper.

use std::path::PathBuf;
use std::process::Command;

use crate::fail;
use crate::tools::{Context, Result, cargo, root, run, run_shown, say};

const TARGET: &str = "x86_64-unknown-linux-gnu";

/// The image before and after stripping.
#[derive(Debug, Clone)]
pub struct Image {
    /// With symbols, for the ELF gate.
    pub full: PathBuf,
    /// What is installed.
    pub stripped: PathBuf,
}

/// Builds the driver domain's image.
pub fn image() -> Result<Image> {
    say("building the driver domain's image");
    build_image(root().join("target/image"), "pciback-stubdom", &[])
}

/// Builds the image of a driver domain that attacks dom0's service.
pub fn hostile() -> Result<PathBuf> {
    say("building a hostile driver domain's image");
    build_image(root().join("target/hostile"), "pciback-hostile", &["--features", "hostile"])
        .map(|image| image.stripped)
}

/// Builds the image of a guest that attacks a driver domain.
pub fn hostile_guest() -> Result<PathBuf> {
    say("building a hostile guest's image");
    build_image(root().join("target/hostile"), "hostile-guest", &["--features", "hostile-guest"])
        .map(|image| image.stripped)
}

/// Builds an image, and puts it stripped into the folder under this name.
fn build_image(dir: PathBuf, name: &str, more: &[&str]) -> Result<Image> {
    run_shown(
        cargo()
            .args([
                "build",
                "--quiet",
                "-p",
                "pciback-stubdom",
                "--profile",
                "image",
                "--target",
                TARGET,
                "--target-dir",
            ])
            .arg(&dir)
            .args(more)
            .env("RUSTFLAGS", "-C relocation-model=static -C no-redzone=yes"),
    )?;
    let full = dir.join(TARGET).join("image/pciback-stubdom");
    let stripped = dir.join(name);
    run(Command::new("objcopy").arg("--strip-all").args([&full, &stripped]))?;
    Ok(Image { full, stripped })
}

/// Builds dom0's tool.
pub fn tool() -> Result<PathBuf> {
    say("building xl-pciback");
    let dir = root().join("target");
    run_shown(cargo().args(["build", "--quiet", "--release", "-p", "xl-pciback", "--target-dir"]).arg(&dir))?;
    Ok(dir.join("release/xl-pciback"))
}

/// Builds the helper, linked statically.
pub fn agent() -> Result<PathBuf> {
    say("building the helper");
    let dir = root().join("target/agent");
    run_shown(
        cargo()
            .args(["build", "--quiet", "--release", "-p", "rig-agent", "--target", TARGET, "--target-dir"])
            .arg(&dir)
            .env("RUSTFLAGS", "-C target-feature=+crt-static -C strip=symbols"),
    )?;
    Ok(dir.join(TARGET).join("release/rig-agent"))
}

/// Size of a file.
pub fn size(path: &std::path::Path) -> Result<u64> {
    Ok(path.metadata().context(path.display())?.len())
}

/// An image given from outside by `PCIBACK_IMAGE`, or the one just built.
pub fn image_or_given() -> Result<PathBuf> {
    match std::env::var_os("PCIBACK_IMAGE").map(PathBuf::from) {
        Some(path) if path.is_file() => Ok(path),
        Some(path) => Err(fail!("PCIBACK_IMAGE: {} is no file", path.display())),
        None => image().map(|image| image.stripped),
    }
}
