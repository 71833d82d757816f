//! `check`: a dry run of a driver domain's xl file against this host.

use std::collections::BTreeMap;

use pciback::cmdline::{self, Mode};

use crate::domains::XenInfo;
use crate::sysfs::{Ecam, Function, Sysfs};
use crate::xlcfg::{self, Value};

/// One problem and what to do about it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Problem {
    /// What is wrong.
    pub what: String,
    /// What to do.
    pub remedy: String,
}

/// Checks the file's `text`.
pub fn check(text: &str, sysfs: &Sysfs, xen: Option<&XenInfo>) -> Vec<Problem> {
    let windows = sysfs.ecam();
    let mut problems = examine(text, windows.as_deref().unwrap_or(&[]), |sbdf| sysfs.function(sbdf).ok(), xen);
    let kernel = match xlcfg::parse(text).0.remove("kernel") {
        Some(Value::Text(kernel)) => Some(kernel),
        _ => None,
    };
    if let Some(kernel) = kernel.filter(|kernel| !std::path::Path::new(kernel).is_file()) {
        problems.push(Problem {
            what: format!("kernel {kernel:?} is no file of this host"),
            remedy: "install the pciback-stubdom image there, or correct the path".into(),
        });
    }
    if let Err(failure) = windows {
        problems.push(Problem { what: failure.what, remedy: failure.remedy });
    }
    problems
}

fn examine(
    text: &str,
    windows: &[Ecam],
    function: impl Fn(pciback::sbdf::Sbdf) -> Option<Function>,
    xen: Option<&XenInfo>,
) -> Vec<Problem> {
    let mut problems = Vec::new();
    let mut say = |what: String, remedy: &str| problems.push(Problem { what, remedy: remedy.to_string() });
    let (values, unknown) = xlcfg::parse(text);
    for line in unknown {
        say(line, "see man xl.cfg; xl-pciback config prints a file that fits");
    }
    let text_of = |key: &str| match values.get(key) {
        Some(Value::Text(text)) => Some(text.as_str()),
        _ => None,
    };
    if text_of("type") != Some("pvh") {
        say("type is not \"pvh\"".into(), "the image boots as a PVH domain only: type = \"pvh\"");
    }
    if values.contains_key("pci") {
        say(
            "pci= is not for a driver domain: libxl refuses it for PVH".into(),
            "take it out; iomem= and dev= are its grant",
        );
    }
    if text_of("name").is_none_or(str::is_empty) {
        say("the domain has no name".into(), "name = \"pciback0\"");
    }
    if text_of("kernel").is_none() {
        say("no kernel is named".into(), "kernel = the path of the pciback-stubdom image");
    }
    if text_of("memory").and_then(|memory| memory.parse::<u32>().ok()).is_none_or(|memory| memory < 4) {
        say("memory is below 4".into(), "memory = 4");
    }
    let (config, complaints) = cmdline::parse(text_of("extra").unwrap_or(""));
    for complaint in complaints {
        say(format!("extra: {complaint}"), "correct this word");
    }
    if config.devices.is_empty() {
        say("extra names no function".into(), "dev=… for each function; xl-pciback config prints them");
    }
    let frames = iomem(&values, &mut say);
    let mut wanted = Vec::new();
    for device in &config.devices {
        let sbdf = device.sbdf;
        let Some(function) = function(sbdf) else {
            say(format!("{sbdf}: the host has no such function"), "lspci -D lists what there is");
            continue;
        };
        if let Some(refusal) = function.refusal() {
            say(refusal.what, &refusal.remedy);
        }
        match device.id {
            Some(id) if id != function.id => {
                let id = format!("{:04x}:{:04x}", id.0, id.1);
                say(
                    format!("{sbdf} is {}, id= says {id}", function.id_text()),
                    "another card is in its place: correct id= or the address",
                );
            }
            None if function.is_virtual => say(
                format!("{sbdf} is a virtual function, which shows its ids to dom0 only"),
                &format!("add id={} to its dev=", function.id_text()),
            ),
            _ => {}
        }
        if let Some(driver) = &function.driver {
            say(format!("{sbdf} is in use by dom0's driver {driver:?}"), &format!("xl-pciback assignable-add {sbdf}"));
        } else if !function.is_assignable() {
            say(format!("{sbdf} was not made assignable"), &format!("xl-pciback assignable-add {sbdf}"));
        }
        let told = config.ecam.iter().find_map(|window| window.frame(sbdf));
        let true_frame = windows.iter().find_map(|window| window.frame(sbdf));
        if !windows.is_empty() && true_frame.is_none() {
            say(
                format!("{sbdf}: no window of ACPI's MCFG table covers its bus"),
                "this function cannot be served; see dmesg | grep -i mcfg",
            );
        }
        if let (Some(told), Some(true_frame)) = (told, true_frame)
            && told != true_frame
        {
            say(
                format!(
                    "{sbdf}: ecam= puts its configuration space at frame {told:x}, ACPI's MCFG table at {true_frame:x}"
                ),
                "take ecam= from xl-pciback config",
            );
        }
        if let Some(frame) = told {
            wanted.push(frame);
            if !frames.contains(&frame) {
                say(format!("{sbdf}: iomem lacks its frame {frame:x}"), &format!("add \"{frame:x},1\" to iomem"));
            }
        }
    }
    for frame in frames.iter().filter(|frame| !wanted.contains(frame)) {
        say(format!("iomem gives frame {frame:x}, which belongs to no dev="), "take it out: least privilege");
    }
    match xen {
        None => {
            say("xl info does not answer, so Xen's command line and the IOMMU were not checked".into(), "run in dom0");
        }
        Some(xen) => {
            if config.mode == Mode::Mmcfg0 && !xen.mmcfg_off() {
                say(
                    "mode=mmcfg0, but this Xen was not booted with mmcfg=0: a configuration write would end the domain"
                        .into(),
                    "boot Xen with mmcfg=0, or say mode=auto",
                );
            }
            if !xen.has_iommu() {
                say("this host has no usable IOMMU".into(), "switch on VT-d or AMD-Vi in the firmware");
            }
        }
    }
    problems
}

/// The frames that `iomem` gives.
fn iomem(values: &BTreeMap<String, Value>, say: &mut impl FnMut(String, &str)) -> Vec<u64> {
    let Some(Value::List(entries)) = values.get("iomem") else {
        say("there is no iomem list".into(), "iomem = [ \"FRAME,1\", … ]; xl-pciback config prints it");
        return Vec::new();
    };
    let mut frames = Vec::new();
    for entry in entries {
        let parsed = entry.split_once(',').and_then(|(frame, count)| {
            let count = u64::from_str_radix(count.trim(), 16).ok().filter(|count| (1..=0x1_0000).contains(count))?;
            Some((u64::from_str_radix(frame.trim().trim_start_matches("0x"), 16).ok()?, count))
        });
        match parsed {
            Some((frame, count)) => frames.extend((0..count).filter_map(|index| frame.checked_add(index))),
            None => say(
                format!("iomem entry {entry:?} is not \"FRAME,COUNT\" in hexadecimal without @gfn"),
                "the image expects frames one to one",
            ),
        }
    }
    frames
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sysfs::NOBODY;

    const GOOD: &str = "name = \"pciback0\"\ntype = \"pvh\"\nkernel = \"/k\"\nmemory = 4\niomem = [ \"b0100,1\" ]\n\
                        extra = \"ecam=0000:00-ff@b0000000 dev=0000:01:00.0,id=1b36:0010 mode=mmcfg0\"\n";

    fn problems(text: &str, change: impl Fn(&mut Function), commandline: &str) -> Vec<String> {
        let windows = [Ecam { base: 0xb000_0000, segment: 0, first_bus: 0, last_bus: 255 }];
        let function = |sbdf: pciback::sbdf::Sbdf| {
            let mut function = Function {
                sbdf,
                id: (0x1b36, 0x10),
                class: 0x01_0802,
                header_type: 0,
                is_virtual: false,
                resources: Default::default(),
                irq: 21,
                driver: None,
                driver_override: Some(NOBODY.into()),
            };
            change(&mut function);
            (sbdf.bus() == 1).then_some(function)
        };
        let xen = XenInfo { commandline: commandline.into(), virt_caps: "pv_directio".into() };
        examine(text, &windows, function, Some(&xen)).into_iter().map(|problem| problem.what).collect()
    }

    #[test]
    fn a_file_that_fits_has_no_problem() {
        assert_eq!(problems(GOOD, |_| {}, "mmcfg=0"), Vec::<String>::new());
        let hosts = GOOD.replace("mode=mmcfg0", "mode=mmcfg0 topology=passthrough");
        assert_eq!(problems(&hosts, |_| {}, "mmcfg=0"), Vec::<String>::new());
    }

    #[test]
    fn each_thing_that_does_not_fit_is_named() {
        let one = |from: &str, to: &str, told: &str| {
            let found = problems(&GOOD.replace(from, to), |_| {}, "mmcfg=0");
            assert!(found.iter().any(|what| what.contains(told)), "{told}: {found:?}");
        };
        one("pvh", "pv", "type is not");
        one("memory = 4", "memory = 3", "memory is below 4");
        one("b0100,1", "b0101,1", "iomem lacks its frame b0100");
        one("b0100,1", "b0101,1", "frame b0101, which belongs to no dev=");
        one("ecam=0000:00-ff", "ecam=0000:10-ff", "no ecam= window covers this function");
        one("memory = 4", "memory = 4\npci = [ \"01:00.0\" ]", "pci= is not for a driver domain");
        one("name = \"pciback0\"", "name = \"\"", "has no name");
        one("b0100,1", "b0100", "is not \"FRAME,COUNT\"");
        one("@b0000000", "@c0000000", "ACPI's MCFG table at b0100");
        one("1b36:0010", "1b36:0011", "id= says 1b36:0011");
        one("dev=0000:01:00.0", "dev=0000:02:00.0", "no such function");
        one("mode=mmcfg0", "mode=fast", "extra: command line, byte");
        one("mode=mmcfg0", "topology=host", "no such topology");
        one("id=1b36:0010", "slot=2 topology=passthrough", "slot= is for topology=vpci");
        let found = problems(GOOD, |function| function.driver = Some("nvme".into()), "mmcfg=0");
        assert!(found[0].contains("dom0's driver \"nvme\""));
        let found = problems(GOOD, |function| function.header_type = 1, "mmcfg=0");
        assert!(found[0].contains("is a bridge"));
        let found = problems(GOOD, |function| function.class = 0x06_0100, "mmcfg=0");
        assert!(found[0].contains("class 0601"));
        assert_eq!(problems(GOOD, |function| function.is_virtual = true, "mmcfg=0"), Vec::<String>::new());
        let found = problems(&GOOD.replace(",id=1b36:0010", ""), |function| function.is_virtual = true, "mmcfg=0");
        assert!(found[0].contains("virtual function"));
        let found = problems(GOOD, |_| {}, "console=com1");
        assert!(found[0].contains("would end the domain"));
    }
}
