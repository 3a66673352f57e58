// SPDX-License-Identifier: Apache-2.0

package structops

import (
	"fmt"
	"strings"
)

// CheckName says whether a congestion control may have that name: 1 to 15 of
// [A-Za-z0-9_.], not of dots alone: a name may become that of a file. The error is
// ErrName.
func CheckName(name string) error {
	if len(name) < 1 || len(name) > 15 {
		return fmt.Errorf("name %q: %w: it has %d bytes, and 1 to 15 are allowed", name, ErrName, len(name))
	}
	if strings.Trim(name, ".") == "" {
		return fmt.Errorf("name %q: %w: it has nothing but dots", name, ErrName)
	}
	for _, c := range []byte(name) {
		letter := c|0x20 >= 'a' && c|0x20 <= 'z'
		if !letter && !(c >= '0' && c <= '9') && c != '_' && c != '.' {
			return fmt.Errorf("name %q: %w: only letters, digits, _ and . are allowed, not %q", name, ErrName, c)
		}
	}
	return nil
}
