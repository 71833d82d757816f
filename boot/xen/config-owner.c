/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * arch/x86/hvm/config-owner.c
 *
 * A domain that holds iomem permission for a PCI function's ECAM frame is that
 * function's config owner. It may
 *  - write the frame, through the intercept that Dom0's writes take,
 *  - prepare, release and restore the function's MSI state,
 *  - map the function's MSI and MSI-X vectors to the PV domain which the
 *    function is assigned to, and unmap them.
 * It is not trusted by Xen or by any other domain. In particular it may have
 * put anything into the function's BARs.
 *
 * Reads go through the (read-only) mapping, with no help from Xen.
 */

#include <xen/acpi.h>
#include <xen/guest_access.h>
#include <xen/iocap.h>
#include <xen/irq.h>
#include <xen/mm.h>
#include <xen/nospec.h>
#include <xen/pci.h>
#include <xen/rangeset.h>
#include <xen/sched.h>

#include <asm/hvm/config-owner.h>
#include <asm/hvm/io.h>
#include <asm/msi.h>
#include <asm/p2m.h>
#include <asm/pci.h>

#include <public/physdev.h>

#include <xsm/xsm.h>

/* Domains with other privilege over devices keep the paths they have. */
static bool may_own(const struct domain *d)
{
    return is_hvm_domain(d) && !is_hardware_domain(d) &&
           !is_control_domain(d) && !d->target;
}

/* Does the domain own any function? Must be quick for those which don't. */
static bool owns_any(const struct domain *d)
{
    unsigned int i;

    if ( rangeset_is_empty(d->iomem_caps) || !may_own(d) )
        return false;

    for ( i = 0; i < pci_mmcfg_config_num; i++ )
    {
        const struct acpi_mcfg_allocation *cfg = &pci_mmcfg_config[i];
        unsigned long base = PFN_DOWN(cfg->address);

        if ( rangeset_overlaps_range(d->iomem_caps,
                                     base + PCI_BDF(cfg->start_bus_number, 0),
                                     base + PCI_BDF(cfg->end_bus_number, 255)) )
            return true;
    }

    return false;
}

bool is_config_owner(const struct domain *d, pci_sbdf_t sbdf)
{
    unsigned int i;

    if ( !may_own(d) )
        return false;

    for ( i = 0; i < pci_mmcfg_config_num; i++ )
    {
        const struct acpi_mcfg_allocation *cfg = &pci_mmcfg_config[i];
        unsigned long mfn = PFN_DOWN(cfg->address) + sbdf.bdf;
        unsigned int seg, bdf;

        /*
         * The decoder has the last word: it knows the windows which are in use
         * as well as the functions which Xen keeps read-only for everybody.
         */
        if ( cfg->pci_segment == sbdf.seg &&
             pci_ro_mmcfg_decode(mfn, &seg, &bdf) &&
             seg == sbdf.seg && bdf == sbdf.bdf )
            return evaluate_nospec(iomem_access_permitted(d, mfn, mfn));
    }

    return false;
}

/*
 * The dummy XSM module, and SILO on top of it, would ask for a privileged
 * caller where an owner was found: there, ownership takes that check's place.
 * FLASK has a policy to be asked, and it must agree. Only FLASK labels domains.
 */
static bool flask_active(void)
{
    return IS_ENABLED(CONFIG_XSM_FLASK) && current->domain->ssid;
}

int config_owner_setup_pci(pci_sbdf_t sbdf)
{
    if ( !is_config_owner(current->domain, sbdf) )
        return -EPERM;

    return flask_active() ? xsm_resource_setup_pci(XSM_PRIV, sbdf.sbdf) : 0;
}

/*
 * Preparing MSI-X makes Xen read the BARs and write-protect what they point at.
 * Must be called before the ranges are added to mmio_ro_ranges.
 */
bool config_owner_msix_ok(const struct arch_msix *msix)
{
    const typeof(msix->table) *ranges[] = { &msix->table, &msix->pba };
    unsigned int i;

    for ( i = 0; i < ARRAY_SIZE(ranges); i++ )
    {
        unsigned long mfn = ranges[i]->first, last = ranges[i]->last;

        if ( mfn > last || rangeset_overlaps_range(mmio_ro_ranges, mfn, last) ||
             !iomem_access_permitted(hardware_domain, mfn, last) )
            return false;

        for ( ; mfn <= last; mfn++ )
            if ( page_is_ram_type(mfn, RAM_TYPE_CONVENTIONAL | RAM_TYPE_ACPI) )
                return false;
    }

    return true;
}

static bool decode(struct domain *d, paddr_t gpa, pci_sbdf_t *sbdf)
{
    unsigned long gfn = PFN_DOWN(gpa);
    unsigned int seg, bdf;
    p2m_type_t p2mt;
    mfn_t mfn;

    if ( likely(!owns_any(d)) )
        return false;

    mfn = get_gfn_query(d, gfn, &p2mt);
    put_gfn(d, gfn);

    if ( p2mt != p2m_mmio_direct ||
         !pci_ro_mmcfg_decode(mfn_x(mfn), &seg, &bdf) )
        return false;

    *sbdf = PCI_SBDF(seg, bdf);

    return is_config_owner(d, *sbdf);
}

static int cf_check ecam_check(struct vcpu *v, unsigned long addr)
{
    pci_sbdf_t sbdf;

    return decode(v->domain, addr, &sbdf);
}

/* For instructions which write memory after reading it. */
static int cf_check ecam_read(struct vcpu *v, unsigned long addr,
                              unsigned int len, unsigned long *data)
{
    uint32_t val = ~0U;
    pci_sbdf_t sbdf;

    *data = ~0UL;

    if ( len <= 4 && IS_ALIGNED(addr, len) && decode(v->domain, addr, &sbdf) )
    {
        pci_mmcfg_read(sbdf.seg, sbdf.bus, sbdf.devfn, PAGE_OFFSET(addr), len,
                       &val);
        *data = val;
    }

    return X86EMUL_OKAY;
}

static int cf_check ecam_write(struct vcpu *v, unsigned long addr,
                               unsigned int len, unsigned long data)
{
    unsigned int reg = PAGE_OFFSET(addr);
    uint32_t val = data;
    pci_sbdf_t sbdf;

    /* Permission may be gone since the check. */
    if ( len > 4 || !IS_ALIGNED(addr, len) ||
         !decode(v->domain, addr, &sbdf) )
    {
        gprintk(XENLOG_WARNING, "refused %u byte config write at %#lx\n",
                len, addr);
        return X86EMUL_OKAY;
    }

    /* Keeps mapping, restoring and preparing out of the MSI state. */
    pcidevs_lock();
    if ( pci_conf_write_intercept(sbdf.seg, sbdf.bdf, reg, len, &val) >= 0 )
        pci_mmcfg_write(sbdf.seg, sbdf.bus, sbdf.devfn, reg, len, val);
    pcidevs_unlock();

    return X86EMUL_OKAY;
}

static const struct hvm_mmio_ops ecam_ops = {
    .check = ecam_check,
    .read = ecam_read,
    .write = ecam_write,
};

void config_owner_init(struct domain *d)
{
    if ( !is_hardware_domain(d) )
        register_mmio_handler(d, &ecam_ops);
}

static int msi_state_op(int cmd, const struct physdev_pci_device *dev)
{
    pci_sbdf_t sbdf = PCI_SBDF(dev->seg, dev->bus, dev->devfn);
    struct pci_dev *pdev;
    int rc;

    pcidevs_lock();

    rc = config_owner_setup_pci(sbdf);
    if ( rc )
        goto out;

    pdev = pci_get_pdev(NULL, sbdf);
    if ( !pdev )
        rc = -ENODEV;
    /* These two may be using MSI themselves, with no prior preparation. */
    else if ( pdev->domain == hardware_domain || pdev->domain == dom_xen )
        rc = -EBUSY;
    else if ( cmd == PHYSDEVOP_restore_msi_ext )
        rc = pci_restore_msi_state(pdev);
    else if ( !pdev->msix )
        rc = -ENODEV;
    else
        rc = pci_prepare_msix(dev->seg, dev->bus, dev->devfn,
                              cmd == PHYSDEVOP_release_msix);

 out:
    pcidevs_unlock();

    return rc;
}

/* The domain whose interrupts are to change. Only PV ones have frontends. */
static int lock_target(domid_t domid, struct domain **d)
{
    int rc = rcu_lock_remote_domain_by_id(domid, d);

    if ( !rc && (!is_pv_domain(*d) || is_hardware_domain(*d)) )
    {
        rcu_unlock_domain(*d);
        rc = -EPERM;
    }

    return rc;
}

/*
 * Dom0 is trusted not to mix MSI and MSI-X and not to map a vector twice, which
 * Xen's accounting doesn't cope with. An owner isn't. Xen will also write to
 * the MSI-X table: the frames must be ones which the target may access, no
 * matter where the BARs pointed when the table was located.
 */
static int check_msi(const struct domain *d, const struct pci_dev *pdev,
                     const struct msi_info *msi)
{
    const struct arch_msix *msix = pdev->msix;
    const struct msi_desc *desc;

    list_for_each_entry ( desc, &pdev->msi_list, list )
    {
        if ( !msi->table_base || desc->msi_attrib.type != PCI_CAP_ID_MSIX )
            return -EBUSY;
        if ( desc->msi_attrib.entry_nr == msi->entry_nr )
            return -EEXIST;
    }

    if ( msi->table_base && msix && msix->table.first &&
         !iomem_access_permitted(d, msix->table.first, msix->table.last) )
        return -EACCES;

    return 0;
}

static int map_pirq(struct physdev_map_pirq *map)
{
    struct msi_info msi = {
        .sbdf = PCI_SBDF(0, map->bus & 0xff, map->devfn & 0xff),
        .entry_nr = map->entry_nr,
        .table_base = map->table_base,
    };
    int type = map->type, rc;
    const struct pci_dev *pdev;
    struct domain *d;

    switch ( type )
    {
    case MAP_PIRQ_TYPE_MSI_SEG:
        type = MAP_PIRQ_TYPE_MSI;
        fallthrough;
    case MAP_PIRQ_TYPE_MULTI_MSI:
        msi.sbdf.seg = map->bus >> 16;
        break;
    }

    /* Xen chooses both: no existing IRQ and no pIRQ in use can be named. */
    if ( map->index != -1 || map->pirq >= 0 ||
         (type == MAP_PIRQ_TYPE_MULTI_MSI && msi.table_base) )
        return -EINVAL;

    rc = lock_target(map->domid, &d);
    if ( rc )
        return rc;

    /* Held across check and use: the function can't change hands meanwhile. */
    pcidevs_lock();

    if ( !is_config_owner(current->domain, msi.sbdf) )
        rc = -EPERM;
    else if ( d->is_dying || !(pdev = pci_get_pdev(d, msi.sbdf)) )
        rc = -ENODEV;
    else
        rc = check_msi(d, pdev, &msi) ?:
             (flask_active() ? xsm_map_domain_pirq(XSM_DM_PRIV, d) : 0) ?:
             allocate_and_map_msi_pirq(d, map->index, &map->pirq, type, &msi);

    if ( !rc )
    {
        unsigned int i, nr = 1;

        if ( type == MAP_PIRQ_TYPE_MULTI_MSI )
            nr = map->entry_nr = msi.entry_nr;

        /* create_irq() gave its caller access, too; it isn't for the owner. */
        for ( i = 0; i < nr; i++ )
            if ( irq_deny_access(current->domain,
                                 domain_pirq_to_irq(d, map->pirq + i)) )
                gprintk(XENLOG_WARNING,
                        "could not drop access to %pd's pIRQ%u\n",
                        d, map->pirq + i);
    }

    pcidevs_unlock();
    rcu_unlock_domain(d);

    return rc;
}

/*
 * A dying domain has lost its functions, but not yet its pIRQs, which must go
 * before the functions are reset. From a living one only the vectors of what is
 * assigned to it can be taken.
 */
static int unmap_pirq(const struct physdev_unmap_pirq *unmap)
{
    const struct msi_desc *msi;
    struct domain *d;
    int irq, rc = lock_target(unmap->domid, &d);

    if ( rc )
        return rc;

    pcidevs_lock();
    write_lock(&d->event_lock);

    irq = unmap->pirq >= 0 ? domain_pirq_to_irq(d, unmap->pirq) : 0;
    msi = irq > 0 ? irq_to_desc(irq)->msi_desc : NULL;

    if ( irq <= 0 )
        rc = -EINVAL;
    else if ( !msi || !msi->dev ||
              !is_config_owner(current->domain, msi->dev->sbdf) )
        rc = -EPERM;
    else if ( msi->dev->domain != d && !d->is_dying )
        rc = -ENODEV;
    else
        rc = (flask_active() ? xsm_unmap_domain_pirq(XSM_DM_PRIV, d) : 0) ?:
             unmap_domain_pirq(d, unmap->pirq);

    write_unlock(&d->event_lock);
    pcidevs_unlock();
    rcu_unlock_domain(d);

    return rc;
}

int config_owner_physdev_op(int cmd, XEN_GUEST_HANDLE_PARAM(void) arg)
{
    /* Only 64-bit callers: the layout of 32-bit ones' structures differs. */
    if ( current->hcall_compat || !owns_any(current->domain) )
        return -ENOSYS;

    switch ( cmd )
    {
    case PHYSDEVOP_prepare_msix:
    case PHYSDEVOP_release_msix:
    case PHYSDEVOP_restore_msi_ext:
    {
        struct physdev_pci_device dev;

        if ( copy_from_guest(&dev, arg, 1) )
            return -EFAULT;

        return msi_state_op(cmd, &dev);
    }

    case PHYSDEVOP_map_pirq:
    {
        struct physdev_map_pirq map;
        int rc;

        if ( copy_from_guest(&map, arg, 1) )
            return -EFAULT;

        if ( map.domid == DOMID_SELF ||
             (map.type != MAP_PIRQ_TYPE_MSI &&
              map.type != MAP_PIRQ_TYPE_MSI_SEG &&
              map.type != MAP_PIRQ_TYPE_MULTI_MSI) )
            return -ENOSYS;

        rc = map_pirq(&map);
        if ( __copy_to_guest(arg, &map, 1) )
            rc = -EFAULT;

        return rc;
    }

    case PHYSDEVOP_unmap_pirq:
    {
        struct physdev_unmap_pirq unmap;

        if ( copy_from_guest(&unmap, arg, 1) )
            return -EFAULT;

        return unmap.domid == DOMID_SELF ? -ENOSYS : unmap_pirq(&unmap);
    }
    }

    return -ENOSYS;
}

/*
 * Local variables:
 * mode: C
 * c-file-style: "BSD"
 * c-basic-offset: 4
 * tab-width: 4
 * indent-tabs-mode: nil
 * End:
 */
