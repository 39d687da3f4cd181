// Counting what is on its way: by the frames that are really written.

package api

import (
	"bytes"
	"testing"

	"golang.org/x/net/http2"
	"pgregory.net/rapid"
)

// However the bytes are cut up, what is counted is the payload of DATA frames.
func TestDataFramesAreFoundInPieces(t *testing.T) {
	rapid.Check(t, func(rt *rapid.T) {
		var wire bytes.Buffer
		framer, want := http2.NewFramer(&wire, nil), 0
		for range rapid.IntRange(0, 20).Draw(rt, "frames") {
			payload := make([]byte, rapid.SampledFrom([]int{0, 1, 5, 9, 100, 16384}).Draw(rt, "length"))
			var err error
			switch rapid.IntRange(0, 4).Draw(rt, "type") {
			case 0, 1:
				want += len(payload)
				err = framer.WriteData(1, false, payload)
			case 2:
				err = framer.WriteHeaders(http2.HeadersFrameParam{StreamID: 1, BlockFragment: payload, EndHeaders: true})
			case 3:
				err = framer.WritePing(true, [8]byte{})
			case 4:
				err = framer.WriteSettings(http2.Setting{ID: http2.SettingInitialWindowSize, Val: 65535})
			}
			if err != nil {
				rt.Fatal(err)
			}
		}
		var frames dataFrames
		got, rest := 0, wire.Bytes()
		for len(rest) > 0 {
			n := rapid.IntRange(1, len(rest)).Draw(rt, "piece")
			got += frames.count(rest[:n])
			rest = rest[n:]
		}
		if got != want || frames.have != 0 || frames.left != 0 {
			rt.Errorf("counted %d bytes of DATA, %d of a header and %d of a frame left; want %d, 0, 0", got, frames.have, frames.left, want)
		}
	})
}

func TestUnreadBytesAreThoseOfAllConnections(t *testing.T) {
	u := newUnread()
	a, b, other := u.open(nil, "n1"), u.open(nil, "n1"), u.open(nil, "n2")
	if a.queued(maxUnreadBytes) || other.queued(1) || !b.queued(1) {
		t.Error("the bound is not on the sum of one owner's connections")
	}
	a.over = true // as Close does, without a connection to close
	for range maxConnections - 2 {
		if u.open(nil, "n1") == nil {
			t.Fatalf("fewer than %d connections", maxConnections)
		}
	}
	if u.open(nil, "n1") != nil || u.open(nil, "n2") == nil {
		t.Error("the bound is not on the connections of one owner")
	}
}
