// SPDX-License-Identifier: Apache-2.0

package vm

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"
)

// The release names directories, and an image may come from anybody.
func TestReleaseNamesNoWayOut(t *testing.T) {
	for release, ok := range map[string]bool{
		"6.12.57+deb13-cloud-amd64": true, "6.1.0-41-cloud-amd64": true, "5.10.0-rc1~exp": true,
		"../../etc": false, "..": false, "6.1/../..": false, "6.1\x1b[2J": false, ".6": false,
	} {
		image := make([]byte, 4096)
		copy(image[0x202:], "HdrS")
		binary.LittleEndian.PutUint16(image[0x206:], 0x20c)
		binary.LittleEndian.PutUint16(image[0x20e:], 0x400)
		image[0x236] = 1
		copy(image[0x600:], release+" (somebody@somewhere) #1")
		got, err := parseRelease(bytes.NewReader(image))
		if ok && (err != nil || got != release) || !ok && err == nil {
			t.Errorf("release %q: %q, %v", release, got, err)
		}
	}
}

// A lock is a file of ours, not what a link of somebody else's points to.
func TestLockFollowsNoLink(t *testing.T) {
	dir := t.TempDir()
	path, target := filepath.Join(dir, ".lock"), filepath.Join(dir, "target")
	if err := os.Symlink(target, path); err != nil {
		t.Fatal(err)
	}
	if _, err := lock(context.Background(), path, func() {}); !errors.Is(err, unix.ELOOP) {
		t.Errorf("error %v, want %v", err, unix.ELOOP)
	}
	if _, err := os.Lstat(target); err == nil {
		t.Error("what the link points to was made")
	}
}
