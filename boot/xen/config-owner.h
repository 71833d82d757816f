/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * Config owners: unprivileged HVM-container domains which hold iomem permission
 * for PCI functions' frames of configuration space. See config-owner.c.
 */
#ifndef __ASM_X86_HVM_CONFIG_OWNER_H__
#define __ASM_X86_HVM_CONFIG_OWNER_H__

#include <xen/pci.h>
#include <xen/types.h>

#include <public/xen.h>

struct arch_msix;
struct domain;

/* Is @d the config owner of function @sbdf? */
bool is_config_owner(const struct domain *d, pci_sbdf_t sbdf);

/* 0 if the current domain owns @sbdf and FLASK, where active, agrees. */
int config_owner_setup_pci(pci_sbdf_t sbdf);

/* May Xen treat the MSI-X structures as being where an owner's BARs say? */
bool config_owner_msix_ok(const struct arch_msix *msix);

/* The owner's physdev operations; -ENOSYS for what is not the owner path's. */
int config_owner_physdev_op(int cmd, XEN_GUEST_HANDLE_PARAM(void) arg);

/* Emulation of writes to the owner's frames. */
void config_owner_init(struct domain *d);

#endif /* __ASM_X86_HVM_CONFIG_OWNER_H__ */
