//! `cargo xtask`: the project's one entry point.
use rig::initramfs::Parts;
use rig::machine::{Machine, Options};
use rig::packages::{self, Release};
use rig::tools::{Result, root, say};
fn main() -> Result<()> {
    let agent = rig::builds::agent()?;
    let base = packages::base(Release::Bookworm)?;
    say("booting");
    let parts = Parts { agent: &agent, tool: None, image: None };
    let o = Options { xen_args: "mmcfg=0".into(), shell: false, dir: root().join("target/rig/bookworm") };
    let mut m = Machine::boot(&base, parts, &o)?;
    say("up");
    print!("{}", m.run(20, "xl list; lspci; ls /var/log/xen; free; xl info | grep virt")?);
    say("done");
    Ok(())
}
