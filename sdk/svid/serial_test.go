// The layout of serial numbers is a contract: revocations are read from it.

package svid_test

import (
	"math/big"
	"testing"

	"pgregory.net/rapid"

	"merlon.dev/sdk/svid"
)

func TestSerialKeepsItsParts(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		agent := rapid.Uint64Range(0, svid.MaxAgent).Draw(t, "agent")
		revision := rapid.Uint64Range(0, svid.MaxRevision).Draw(t, "revision")
		s, err := svid.NewSerial(agent, revision)
		if err != nil {
			t.Fatal(err)
		}
		realm := rapid.Uint32Range(0, svid.MaxRealm).Draw(t, "realm")
		if s = s.In(realm); s.Realm != realm || s.Agent != agent || s.Revision != revision || s.Random == 0 {
			t.Fatalf("NewSerial(%d, %d) = %+v", agent, revision, s)
		}
		n := s.Big()
		if n.Sign() <= 0 || n.BitLen() > 159 {
			t.Fatalf("%x has %d bits; want at most 159 and more than none", n, n.BitLen())
		}
		if back, ok := svid.SerialFromBig(n); !ok || back != s {
			t.Fatalf("SerialFromBig(%x) = %+v, %t; want %+v", n, back, ok, s)
		}
		if s.String() != n.Text(16) {
			t.Fatalf("String() = %s; want %x", s, n)
		}
	})
}

// Whatever number is read, it is read without loss.
func TestSerialReadsEveryNumberWithoutLoss(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		n := new(big.Int).SetBytes(rapid.SliceOfN(rapid.Byte(), 0, 24).Draw(t, "bytes"))
		if s, ok := svid.SerialFromBig(n); ok && s.Big().Cmp(n) != 0 {
			t.Fatalf("%x was read as %x", n, s.Big())
		}
	})
}

func TestSerialLayout(t *testing.T) {
	s := svid.Serial{Agent: 0xa1b2c3d4e5f6, Revision: 1, Random: 0x0123456789abcdef}
	// 48 bits of agent, 8 of realm, 39 of revision, 64 of randomness; the 160th bit is clear.
	if got, want := s.String(), "50d961ea72fb0000000000010123456789abcdef"; got != want {
		t.Errorf("String() = %s; want %s", got, want)
	}
	if got, want := s.In(3).String(), "50d961ea72fb0180000000010123456789abcdef"; got != want {
		t.Errorf("In(3).String() = %s; want %s", got, want)
	}
	top := svid.Serial{Agent: svid.MaxAgent, Realm: svid.MaxRealm, Revision: svid.MaxRevision, Random: 1<<64 - 1}
	if n := top.Big(); n.BitLen() != 159 || len(n.Bytes()) > 20 {
		t.Errorf("the largest number has %d bits", n.BitLen())
	}
}

func TestSerialRefusesWhatDoesNotFit(t *testing.T) {
	if _, err := svid.NewSerial(svid.MaxAgent+1, 0); err == nil {
		t.Error("an agent handle of 49 bits was taken")
	}
	if _, err := svid.NewSerial(0, svid.MaxRevision+1); err == nil {
		t.Error("a revision of 40 bits was taken")
	}
	for _, n := range []*big.Int{nil, big.NewInt(0), big.NewInt(-5), new(big.Int).Lsh(big.NewInt(1), 159), new(big.Int).Lsh(big.NewInt(1), 64)} {
		if s, ok := svid.SerialFromBig(n); ok {
			t.Errorf("SerialFromBig(%v) = %+v; want none", n, s)
		}
	}
}

// T44: numbers do not repeat, even for one agent at one revision.
func TestT44SerialsAreUnique(t *testing.T) {
	const many = 1_000_000
	seen := make(map[svid.Serial]struct{}, many)
	for range many {
		s, err := svid.NewSerial(7, 9)
		if err != nil {
			t.Fatal(err)
		}
		seen[s] = struct{}{}
	}
	if len(seen) != many {
		t.Errorf("%d of %d numbers were given before", many-len(seen), many)
	}
}
