#!/bin/bash
# build.sh DIR - build a virtual machine's kernel, initramfs and root disk, of Debian packages only
# Root only, on Debian 12 or newer; about a minute.  Makes vmlinuz, initrd.gz and root.ext4 in DIR.
set -euo pipefail
here=$(dirname "$(realpath "$0")")
mkdir -p "$1"
cd "$1"
suite=bookworm
mirror=$(apt-get indextargets --format '$(SITE)' 'Created-By: Packages' | head -n 1)
packages=daemontools,chrony,iproute2,iputils-ping,procps,kmod,tzdata,busybox-static,python3
modules="virtio_pci virtio_blk virtio_console virtio_net virtio_rng"
work=$(mktemp -d "$PWD/.build.XXXXXX")
trap 'rm -rf "$work"' EXIT

missing=()
for each in qemu-system-x86_64:qemu-system-x86 debootstrap:debootstrap cpio:cpio mke2fs:e2fsprogs \
    modprobe:kmod; do
    command -v "${each%:*}" >/dev/null || missing+=("${each#*:}")
done
[ ${#missing[@]} = 0 ] ||
    DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends "${missing[@]}" >/dev/null
[ -n "$(apt-cache show -n linux-image-cloud-amd64 2>/dev/null)" ] || apt-get update -qq

# the kernel is unpacked, not installed
kernel=$(apt-cache depends linux-image-cloud-amd64 | awk '/Depends:/ { print $2; exit }')
(cd "$work" && apt-get download -qq "$kernel" 2>/dev/null && dpkg-deb -x linux-image-*.deb kernel)
version=$(ls "$work/kernel/lib/modules")
depmod -b "$work/kernel" "$version"

root=$work/root
debootstrap --variant=minbase --include="$packages" "$suite" "$root" "$mirror" >build.log 2>&1 ||
    { tail -n 20 build.log; exit 1; }
rm -rf "$root"/var/cache/apt/* "$root"/var/lib/apt/lists/* "$root"/usr/share/{doc,man,locale,info}/*
mkdir -p "$root/rig" "$root/out"
echo '127.0.0.1 localhost vmrig' >"$root/etc/hosts"
install -m 755 "$here/guest-init" "$root/rig-init"
rm -f root.ext4
size=$(($(du -sm "$root" | cut -f1) + 300))M
mke2fs -q -t ext4 -m 0 -O ^has_journal -E root_owner=0:0 -d "$root" root.ext4 "$size"

# the initramfs: busybox and the virtio modules, in the order in which they load
initrd=$work/initrd
mkdir -p "$initrd"/{bin,dev,modules,root}
cp "$root/bin/busybox" "$initrd/bin/busybox"
for each in $modules; do modprobe -d "$work/kernel" -S "$version" --show-depends "$each"; done |
    awk '$1 == "insmod" && !seen[$2]++ { print $2 }' | while read -r module; do
        cp "$module" "$initrd/modules/"
        basename "$module" >>"$initrd/modules/order"
    done
cat >"$initrd/init" <<'INIT'
#!/bin/busybox sh
b=/bin/busybox
$b mount -t devtmpfs dev /dev
for module in $($b cat /modules/order); do $b insmod /modules/$module 2>/dev/null; done
for try in 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20; do [ -b /dev/vda ] && break; $b sleep 0.1; done
$b mount -t ext4 /dev/vda /root || $b poweroff -f
$b mount -o move /dev /root/dev
exec $b switch_root /root /rig-init
INIT
chmod 755 "$initrd/init"
(cd "$initrd" && find . | cpio -o -H newc --quiet | gzip -9) >initrd.gz
cp "$work/kernel/boot/vmlinuz-$version" vmlinuz  # last: it says that all is there
chmod 644 vmlinuz
