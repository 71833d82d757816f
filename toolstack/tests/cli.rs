//! The program as a user meets it: messages, exit codes, and that neither wrong words nor a machine
//! without Xen ends in a backtrace. sysfs is a tree of the test, `xl` a script of the test.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

struct Machine(PathBuf);

impl Machine {
    /// A host with one NVMe drive at 0000:01:00.0 and the host bridge, and an `xl` that says `info`.
    fn new(name: &str, info: &str) -> Machine {
        let root = std::env::temp_dir().join(format!("xl-pciback-cli-{}-{name}", std::process::id()));
        for (sbdf, class, driver_override) in
            [("0000:01:00.0", "0x010802", "pciback-stubdom"), ("0000:00:00.0", "0x060000", "(null)")]
        {
            let folder = root.join("sys/bus/pci/devices").join(sbdf);
            fs::create_dir_all(&folder).unwrap();
            for (name, text) in [
                ("vendor", "0x1b36"),
                ("device", "0x0010"),
                ("class", class),
                ("irq", "21"),
                ("driver_override", driver_override),
                ("resource", "0x00000000fe600000 0x00000000fe603fff 0x0000000000140204"),
            ] {
                fs::write(folder.join(name), format!("{text}\n")).unwrap();
            }
            fs::write(folder.join("config"), [0u8; 64]).unwrap();
        }
        let mut table = vec![0u8; 44];
        table[..4].copy_from_slice(b"MCFG");
        table[4] = 60;
        table.extend(0xb000_0000u64.to_le_bytes());
        table.extend([0, 0, 0, 255, 0, 0, 0, 0]);
        let folder = root.join("sys/firmware/acpi/tables");
        fs::create_dir_all(&folder).unwrap();
        fs::write(folder.join("MCFG"), table).unwrap();
        let xl = root.join("xl");
        fs::write(&xl, format!("#!/bin/sh\nprintf '{info}'\n")).unwrap();
        fs::set_permissions(&xl, fs::Permissions::from_mode(0o755)).unwrap();
        Machine(root)
    }

    fn run(&self, args: &[&str]) -> (i32, String, String) {
        let output: Output = Command::new(env!("CARGO_BIN_EXE_xl-pciback"))
            .args(args)
            .env("XL_PCIBACK_SYSFS", &self.0)
            .env("PATH", format!("{}:/usr/bin:/bin", self.0.display()))
            .output()
            .unwrap();
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        (output.status.code().unwrap_or(-1), text(&output.stdout), text(&output.stderr))
    }

    fn file(&self, name: &str, text: &str) -> String {
        let path = self.0.join(name);
        fs::write(&path, text).unwrap();
        path.display().to_string()
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

const MMCFG0: &str = "virt_caps : pv pv_directio\\nxen_commandline : console=com1 mmcfg=0\\n";
const STOCK: &str = "virt_caps : pv pv_directio\\nxen_commandline : console=com1\\n";

#[test]
fn wrong_words_are_named_and_end_with_2() {
    let machine = Machine::new("usage", STOCK);
    for (args, told) in [
        (&[][..], "no command"),
        (&["frobnicate"], "\"frobnicate\""),
        (&["attach"], "wants GUEST BDF"),
        (&["attach", "g1", "nonsense"], "\"nonsense\" is not a PCI address"),
        (&["attach", "g1", "01:00.0", "02:00.0"], "wants GUEST BDF"),
        (&["attach", "--force", "g1", "01:00.0"], "attach has no option --force"),
        (&["attach", "--seize", "g1"], "wants GUEST BDF"),
        (&["detach", "--seize", "g1", "01:00.0"], "detach has no option --seize"),
        (&["config", "01:*.*"], "\"01:*.*\" is not a PCI address"),
        (&["assignable-add"], "at least one function"),
        (&["assignable-add", "--no-rebind", "01:00.0"], "no option --no-rebind"),
        (&["detach", "--timeout", "soon", "g1", "01:00.0"], "--timeout"),
        (&["detach", "--timeout"], "--timeout"),
        (&["list", "all"], "takes no argument"),
        (&["list", "--jsn"], "--jsn"),
        (&["config", "--mode", "fast", "01:00.0"], "--mode fast"),
        (&["config", "--guest", "a,permissive", "01:00.0"], "--guest"),
        (&["config", "01:00.0", "01:00.0"], "named twice"),
        (&["check"], "one FILE"),
    ] {
        let (code, out, err) = machine.run(args);
        assert_eq!((code, out.as_str()), (2, ""), "{args:?}: {err}");
        assert!(err.contains(told), "{args:?}: {err}");
        assert!(err.contains("\nremedy: ") && !err.contains("panicked"), "{err}");
    }
}

#[test]
fn every_command_explains_itself() {
    let machine = Machine::new("help", STOCK);
    let (code, all, _) = machine.run(&["--help"]);
    assert_eq!(code, 0);
    for command in
        ["assignable-add", "assignable-remove", "assignable-list", "config", "check", "attach", "detach", "list"]
    {
        assert!(all.contains(&format!("\n  {command}")), "{command}");
        let (code, text, _) = machine.run(&[command, "--help"]);
        assert!(code == 0 && text.starts_with(&format!("Usage: xl-pciback {command}")), "{command}: {text}");
    }
    assert_eq!(machine.run(&["--version"]).1, format!("xl-pciback {}\n", env!("CARGO_PKG_VERSION")));
}

#[test]
fn config_prints_what_check_accepts() {
    let machine = Machine::new("config", MMCFG0);
    let image = machine.file("image", "");
    let (code, star, err) = machine.run(&["config", "01:00.*", "--guest", "db1", "--kernel", &image]);
    assert_eq!(code, 0, "{err}");
    let (code, text, err) = machine.run(&["config", "01:00.0", "--guest", "db1", "--kernel", &image]);
    assert_eq!(star, text, "the slot has one function");
    assert_eq!(code, 0, "{err}");
    let wanted = format!(
        "# Driver domain for PCI functions, written by xl-pciback config.\n\
         # 0000:01:00.0: 1b36:0010, GSI 21, configuration space at frame b0100\n\
         # Xen has mmcfg=0: mmcfg0, in which the domain writes configuration space itself\n\
         name = \"pciback0\"\ntype = \"pvh\"\nkernel = \"{image}\"\nmemory = 4\nmaxmem = 4\nvcpus = 1\n\
         # It takes the time by Xen's clock, which fits each processor: emulating the counter would only cost.\n\
         tsc_mode = \"native\"\niomem = [ \"b0100,1\" ]\n\
         extra = \"ecam=0000:00-ff@b0000000 dev=0000:01:00.0,guest=db1,id=1b36:0010 mode=mmcfg0\"\n"
    );
    assert_eq!(text, wanted);
    let file = machine.file("good.cfg", &text);
    assert_eq!(machine.run(&["check", &file]), (0, format!("{file}: fits this host\n"), String::new()));

    let stock = Machine::new("config-stock", STOCK);
    let (code, text, _) = stock.run(&["config", "01:00.0", "--kernel", &image]);
    let why = "\n# auto: direct with the config-owner change, otherwise through xl-pciback serve\n";
    assert!(code == 0 && text.contains(" mode=auto\"") && text.contains(why), "{text}");
    let auto = stock.file("auto.cfg", &text);
    assert_eq!(stock.run(&["check", &auto]), (0, format!("{auto}: fits this host\n"), String::new()));
    let (code, out, err) = stock.run(&["check", &file]);
    assert_eq!(code, 3);
    assert!(out.contains("would end the domain\n  remedy: boot Xen with mmcfg=0"), "{out}");
    assert!(err.contains("1 problem(s)"), "{err}");
}

#[test]
fn config_takes_only_a_mode_that_works_on_this_xen() {
    for (name, info, right, wrong) in [
        ("mode-mmcfg0", MMCFG0, &["mmcfg0", "auto", "read-only"][..], None),
        ("mode-stock", STOCK, &["auto", "read-only"], Some("mmcfg0")),
    ] {
        let machine = Machine::new(name, info);
        let image = machine.file("image", "");
        for mode in right {
            let (code, text, err) = machine.run(&["config", "01:00.0", "--mode", mode, "--kernel", &image]);
            assert!(code == 0 && text.contains(&format!(" mode={mode}\"")), "{mode}: {err}");
            let file = machine.file("one.cfg", &text);
            assert_eq!(machine.run(&["check", &file]).0, 0, "{text}");
        }
        let Some(wrong) = wrong else { continue };
        let (code, out, err) = machine.run(&["config", "01:00.0", "--mode", wrong]);
        assert!(code == 1 && out.is_empty() && err.contains(&format!("--mode {wrong}: this Xen was")), "{err}");
        assert!(err.contains("boot Xen with mmcfg=0"), "{err}");
    }
}

#[test]
fn what_cannot_be_served_gets_no_configuration() {
    let machine = Machine::new("refused", STOCK);
    let (code, out, err) = machine.run(&["config", "00:00.0"]);
    assert!(code == 1 && out.is_empty() && err.contains("class 0600"), "{err}");
    let (code, _, err) = machine.run(&["config", "77:00.0"]);
    assert!(code == 1 && err.contains("0000:77:00.0: the host has no such PCI function"), "{err}");
    let (code, _, err) = machine.run(&["check", "/nonexistent.cfg"]);
    assert!(code == 1 && err.contains("/nonexistent.cfg cannot be read"), "{err}");
}

#[test]
fn without_xen_it_says_so() {
    if Path::new("/sys/hypervisor/version").exists() {
        return;
    }
    let machine = Machine::new("no-xen", STOCK);
    for args in [&["attach", "g1", "01:00.0"][..], &["list"], &["assignable-add", "01:00.0"]] {
        let (code, _, err) = machine.run(args);
        assert!(code == 1 && err.contains("not running under Xen as dom0"), "{args:?}: {err}");
    }
}

/// What starts the service on a host: a wrong word there would only show on that host.
#[test]
fn the_service_files_start_what_there_is() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("service");
    let [unit, script] = ["xl-pciback.service", "xl-pciback.openrc"].map(|name| folder.join(name));
    let text = fs::read_to_string(&unit).unwrap();
    let start = text.lines().find_map(|line| line.strip_prefix("ExecStart=")).expect("a command");
    let (program, words) = start.split_once(' ').expect("words");
    let script_text = fs::read_to_string(&script).unwrap();
    for line in [format!("command=\"{program}\""), format!("command_args=\"{words}\"")] {
        assert!(script_text.lines().any(|other| other == line), "the OpenRC script has no line {line}");
    }
    let machine = Machine::new("service", "");
    let (code, said, _) = machine.run(&[words, "--help"]);
    assert!(code == 0 && said.contains("serve"), "{words} --help: {code}, {said}");
    let parsed = Command::new("sh").arg("-n").arg(&script).output().unwrap();
    assert!(parsed.status.success(), "{parsed:?}");

    let checked = machine.file("xl-pciback.service", &text.replace(program, env!("CARGO_BIN_EXE_xl-pciback")));
    match Command::new("systemd-analyze").args(["verify", &checked]).output() {
        Ok(verdict) => {
            let said = String::from_utf8_lossy(&verdict.stderr).into_owned();
            // It tells of other units of this machine, too, and of a host without systemd.
            let about: Vec<&str> = said.lines().filter(|line| line.contains("xl-pciback")).collect();
            assert!(about.is_empty(), "systemd-analyze verify: {about:?}");
        }
        Err(_) => println!("systemd-analyze is not there: the unit is not verified"),
    }
}
