// SPDX-License-Identifier: Apache-2.0

package fault

import (
	"errors"
	"testing"
)

func TestSet(t *testing.T) {
	refused := errors.New("refused")
	restore := Set(func(step string) error {
		if step == "load program move" {
			return refused
		}
		return nil
	})
	if err := At("load program move"); err != refused {
		t.Errorf("the chosen step: %v, want %v", err, refused)
	}
	if err := At("load program count"); err != nil {
		t.Errorf("another step: %v", err)
	}
	restore()
	if err := At("load program move"); err != nil {
		t.Errorf("after restore: %v", err)
	}
}
