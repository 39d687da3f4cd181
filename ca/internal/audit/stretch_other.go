//go:build !linux

package audit

import (
	"errors"
	"math"
	"os"
)

func allocateAhead(*os.File, int64, int64) error { return errors.ErrUnsupported }

func freeOn(string) (uint64, error) { return math.MaxUint64, nil }
