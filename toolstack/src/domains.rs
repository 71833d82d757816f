//! What `xl` knows of domains and of the hypervisor. `xl` is asked rather than libxl linked: its JSON
//! output is stable, and it is there wherever domains are started.

use std::process::Command;

use serde_json::Value;

use crate::error::{Failure, Outcome};

/// A guest, as far as attaching a device needs it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Guest {
    /// Domain number.
    pub domid: u32,
    /// Name.
    pub name: String,
    /// `pv`, `pvh` or `hvm`.
    pub kind: String,
    /// `e820_host` in its configuration.
    pub e820_host: bool,
    /// `passthrough` in its configuration.
    pub passthrough: String,
}

/// What `xl info` says.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct XenInfo {
    /// Xen's command line.
    pub commandline: String,
    /// What the machine can do.
    pub virt_caps: String,
}

impl XenInfo {
    /// Whether Xen was booted so that it does not know ECAM, and domains may write it.
    pub fn mmcfg_off(&self) -> bool {
        self.commandline.split_ascii_whitespace().any(|word| {
            matches!(word.split_once('='), Some(("mmcfg", value)) if matches!(value.split(',').next(), Some("0" | "off" | "no" | "false" | "disable")))
                || word == "no-mmcfg"
        })
    }

    /// Whether devices can be passed through with an IOMMU.
    pub fn has_iommu(&self) -> bool {
        self.virt_caps.split_ascii_whitespace().any(|cap| cap == "pv_directio" || cap == "hvm_directio")
    }
}

/// Where facts about domains come from.
pub trait Domains {
    /// The guest with this name or number.
    ///
    /// # Errors
    /// There is none, or it cannot be asked for.
    fn guest(&self, name: &str) -> Outcome<Guest>;
    /// Facts about the hypervisor.
    ///
    /// # Errors
    /// `xl info` does not answer.
    fn xen(&self) -> Outcome<XenInfo>;
}

/// The real one.
pub struct Xl;

fn xl(args: &[&str]) -> Outcome<String> {
    let output = Command::new("xl").args(args).output().map_err(|error| {
        Failure::new(format!("xl cannot be run: {error}"), "install Xen's tools and run as root in dom0")
    })?;
    if !output.status.success() {
        let told = String::from_utf8_lossy(&output.stderr);
        return Err(Failure::new(
            format!("xl {} failed: {}", args.join(" "), told.lines().last().unwrap_or("no message")),
            "see `xl list`",
        ));
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

impl Domains for Xl {
    fn guest(&self, name: &str) -> Outcome<Guest> {
        let text = xl(&["list", "-l", name]).map_err(|failure| {
            if failure.what.contains("cannot be run") {
                return failure;
            }
            Failure::new(format!("there is no domain {name:?}"), "start the guest first; `xl list` shows what runs")
        })?;
        parse_guest(&text).ok_or_else(|| {
            Failure::new(
                format!("xl list -l {name} has a form this tool does not know"),
                "report the Xen release to the project",
            )
        })
    }

    fn xen(&self) -> Outcome<XenInfo> {
        Ok(parse_info(&xl(&["info"])?))
    }
}

fn parse_info(text: &str) -> XenInfo {
    let value = |key: &str| {
        let lines = text.lines().filter_map(|line| line.split_once(':'));
        lines
            .into_iter()
            .find(|(name, _)| name.trim() == key)
            .map(|(_, value)| value.trim().to_string())
            .unwrap_or_default()
    };
    XenInfo { commandline: value("xen_commandline"), virt_caps: value("virt_caps") }
}

fn parse_guest(text: &str) -> Option<Guest> {
    let json: Value = serde_json::from_str(text).ok()?;
    let domain = json.as_array()?.first()?;
    let create = domain.get("config")?.get("c_info")?;
    let build = domain.get("config")?.get("b_info")?;
    let pv = build.get("type.pv").or_else(|| build.get("u.pv"));
    let e820 = pv.and_then(|pv| pv.get("e820_host"));
    Some(Guest {
        domid: u32::try_from(domain.get("domid")?.as_u64()?).ok()?,
        name: create.get("name")?.as_str()?.to_string(),
        kind: create.get("type")?.as_str()?.to_string(),
        // libxl writes a boolean that may be unset as a string.
        e820_host: e820.is_some_and(|value| value.as_str() == Some("True") || value.as_bool() == Some(true)),
        passthrough: create.get("passthrough").and_then(Value::as_str).unwrap_or("disabled").to_string(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_two_facts_of_a_pv_guest_are_found() {
        let text = r#"[{"domid":3,"config":{"c_info":{"type":"pv","name":"db1","passthrough":"enabled"},
            "b_info":{"type.pv":{"e820_host":"True"}}}}]"#;
        let guest = parse_guest(text).unwrap();
        assert_eq!((guest.domid, guest.name.as_str(), guest.e820_host), (3, "db1", true));
        assert_eq!(guest.passthrough, "enabled");
        let guest =
            parse_guest(r#"[{"domid":3,"config":{"c_info":{"type":"pv","name":"a"},"b_info":{"type.pv":{}}}}]"#)
                .unwrap();
        assert_eq!((guest.e820_host, guest.passthrough.as_str()), (false, "disabled"));
        assert_eq!(parse_guest("[]"), None);
        assert_eq!(parse_guest("nonsense"), None);
    }

    #[test]
    fn every_way_to_switch_mmcfg_off_is_seen() {
        for (line, off) in [
            ("console=com1 mmcfg=0", true),
            ("mmcfg=off,amd-fam10", true),
            ("mmcfg=no", true),
            ("no-mmcfg", true),
            ("mmcfg=1", false),
            ("mmcfg", false),
            ("xmmcfg=0", false),
            ("", false),
        ] {
            let info = XenInfo { commandline: line.into(), ..XenInfo::default() };
            assert_eq!(info.mmcfg_off(), off, "{line}");
        }
        let info = parse_info("virt_caps              : pv hvm pv_directio\nxen_commandline        : a b:c\n");
        assert!(info.has_iommu());
        assert_eq!(info.commandline, "a b:c");
    }
}
