package crashtest

// Damaged files: all acknowledged data is there, or the store does not open and
// says why.

import (
	"fmt"
	"maps"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"merlon.dev/ca/internal/store/badger"
)

// image is a store folder with a known history.
type image struct {
	name    string
	dir     string
	last    uint64            // acknowledged
	digests map[uint64]string // of the history, by revision
}

// images makes two: of a store that was closed, and of one as SIGKILL leaves
// it. Both have tables, a manifest with several records and logs.
func images(t testing.TB) []image {
	t.Helper()
	dir := filepath.Join(t.TempDir(), "store")
	var last uint64
	for range 3 {
		last = writeSome(t, dir, nil)
	}
	closed, killed := t.TempDir(), t.TempDir()
	if err := copyStore(dir, closed); err != nil {
		t.Fatal(err)
	}
	all := []image{{name: "closed", dir: closed, last: last}}
	last = writeSome(t, dir, func() {
		if err := copyStore(dir, killed); err != nil {
			t.Fatal(err)
		}
	})
	all = append(all, image{name: "killed", dir: killed, last: last})
	for i := range all {
		all[i].digests = undamaged(t, all[i])
	}
	return all
}

// writeSome opens the store in dir, writes, calls then, and closes it.
func writeSome(t testing.TB, dir string, then func()) (last uint64) {
	t.Helper()
	s, err := badger.Open(dir, badger.Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := s.Close(); err != nil {
			t.Error(err)
		}
	}()
	var wg sync.WaitGroup
	var mu sync.Mutex
	for w := range 8 {
		wg.Go(func() {
			for i := range 25 {
				id := fmt.Sprintf("%d.%d.%d", os.Getpid(), w, i)
				res, err := s.Txn(t.Context(), nil, ops(id, branchThen, []write{
					{Key: groupKey(w%groups, i%keysPerGroup), Delete: i%7 == 6}, {Key: fmt.Sprintf("u/%d.%d", w, i), Size: 30 * i},
				}), nil)
				if err != nil {
					t.Error(err)
					return
				}
				mu.Lock()
				last = max(last, res.Revision)
				mu.Unlock()
			}
		})
	}
	wg.Wait()
	if then != nil {
		then()
	}
	return last
}

// undamaged inspects a copy that nothing happened to.
func undamaged(t testing.TB, img image) map[uint64]string {
	t.Helper()
	dir := filepath.Join(t.TempDir(), "copy")
	if err := copyStore(img.dir, dir); err != nil {
		t.Fatal(err)
	}
	p := newRig(t, target{}, plain(t), 1).launch(life{Folders: []string{dir}})
	lines, _, err := p.bury()
	if err != nil || len(lines) != 5 || lines[1].Text != "" {
		t.Fatalf("the undamaged store: %+v, %v: %s", lines, err, p.lastWords())
	}
	digests := make(map[uint64]string)
	for _, kv := range lines[1].Result.KVs {
		digests[kv.Revision] = kv.Label
	}
	if lines[1].Result.Revision < img.last {
		t.Fatalf("the undamaged store is at revision %d; %d was acknowledged", lines[1].Result.Revision, img.last)
	}
	return digests
}

// The outcomes of opening a damaged store.
const (
	whole   = "all there"
	refused = "refused" // with a type that programs know, saying what is missing
	unclear = "UNCLEAR" // refused with any other error
	lost    = "SILENT LOSS"
	wrong   = "WRONG DATA"
	crashed = "CRASHED"
	stuck   = "cannot write"
)

// judge says what came out of one case; detail is for failures.
func (img image) judge(lines []line, dead string) (outcome, detail string) {
	for n, l := range lines {
		switch l.What {
		case lineRefused:
			if l.Typed {
				return refused, l.Text
			}
			return unclear, l.Text
		case lineFail:
			return stuck, l.Text
		case lineOpen:
			got := l.Result
			switch at := min(got.Revision, img.newest()); {
			case l.Text != "":
				return wrong, l.Text
			case got.Revision < img.last:
				return lost, fmt.Sprintf("opened at revision %d; %d was acknowledged", got.Revision, img.last)
			case n > 1 && got.Revision <= lines[0].Result.Revision:
				return lost, fmt.Sprintf("at revision %d after one more write, as before it", got.Revision)
			case digestAt(got, at) != img.digests[at]:
				return wrong, fmt.Sprintf("the history up to revision %d is another one", at)
			}
		}
	}
	if len(lines) == 0 || lines[len(lines)-1].What != lineClosed {
		return crashed, dead
	}
	return whole, ""
}

func (img image) newest() uint64 { return slices.Max(slices.Collect(maps.Keys(img.digests))) }

func digestAt(res *result, revision uint64) string {
	for _, kv := range res.KVs {
		if kv.Revision == revision {
			return kv.Label
		}
	}
	return "none"
}

// memory is where copies are damaged: nothing here is about syncs, and on a disk
// they would take most of the time.
var memory = func() string {
	const shm = "/dev/shm"
	if unix.Access(shm, unix.W_OK) == nil {
		return shm
	}
	return ""
}()

// sweep damages copies of img and judges each.
type sweep struct {
	t       testing.TB
	program string
	img     image

	mu     sync.Mutex
	table  map[string]map[string]int // by class and kind of damage, by outcome; guarded by mu
	broken []string                  // guarded by mu
	said   map[string]string         // an example of each refusal; guarded by mu
}

// run takes the cases in groups, each in one child, two children at a time.
func (s *sweep) run(cases []damage) {
	const perChild = 12
	work := make(chan []damage)
	var wg sync.WaitGroup
	for range 2 {
		wg.Go(func() {
			for some := range work {
				for len(some) > 0 {
					some = some[s.some(some):]
				}
			}
		})
	}
	for some := range slices.Chunk(cases, perChild) {
		work <- some
	}
	close(work)
	wg.Wait()
}

// some runs one child over cases and returns how many it came through, at
// least one: a child that dies takes only the case with it in which it died.
func (s *sweep) some(cases []damage) (done int) {
	base, err := os.MkdirTemp(memory, "damage")
	if err != nil {
		s.t.Error(err)
		return len(cases)
	}
	defer os.RemoveAll(base)
	var l life
	for i, d := range cases {
		dir := filepath.Join(base, fmt.Sprint(i))
		if err := copyStore(s.img.dir, dir); err != nil {
			s.t.Error(err)
		}
		if err := d.apply(dir); err != nil {
			s.t.Errorf("%s: %v", d, err)
		}
		l.Folders = append(l.Folders, dir)
	}
	p := newRig(s.t, target{}, s.program, 1).launch(l)
	select {
	case <-p.ended:
	case <-time.After(patience):
		p.signal() // it hangs; the case is judged so
	}
	lines, _, err := p.bury()
	var of [][]line
	for _, said := range lines {
		if said.What == lineCase {
			of = append(of, nil)
		} else if len(of) > 0 {
			of[len(of)-1] = append(of[len(of)-1], said)
		}
	}
	for i, said := range of {
		s.note(cases[i], said, fmt.Sprintf("%v: %s", err, p.lastWords()))
	}
	return max(1, len(of))
}

func (s *sweep) note(d damage, said []line, dead string) {
	outcome, detail := s.img.judge(said, dead)
	s.mu.Lock()
	defer s.mu.Unlock()
	row := fmt.Sprintf("%-7s %-12s %-9s", s.img.name, d.class(), d.kind)
	if s.table[row] == nil {
		s.table[row] = make(map[string]int)
	}
	s.table[row][outcome]++
	switch outcome {
	case whole:
	case refused:
		if _, reason, ok := strings.Cut(detail, "is damaged: "); ok && s.said[row] == "" {
			s.said[row] = reason
		}
	default:
		s.broken = append(s.broken, fmt.Sprintf("%s: %s: %s: %.300s", s.img.name, d, outcome, detail))
	}
}

// log prints the table of damage and outcome.
func (s *sweep) log() {
	var out strings.Builder
	for _, row := range slices.Sorted(maps.Keys(s.table)) {
		fmt.Fprintf(&out, "%s", row)
		for _, outcome := range []string{whole, refused, unclear, stuck, lost, wrong, crashed} {
			if n := s.table[row][outcome]; n > 0 {
				fmt.Fprintf(&out, "  %s: %d", outcome, n)
			}
		}
		out.WriteByte('\n')
		if text := s.said[row]; text != "" {
			fmt.Fprintf(&out, "        %.200s\n", text)
		}
	}
	s.t.Logf("store, file, damage: outcomes, with an example of each refusal\n%s", out.String())
}

func sweepImage(t testing.TB, program string, img image, perFile int, only func(damage) bool, rng *rand.Rand) *sweep {
	t.Helper()
	s := &sweep{t: t, program: program, img: img, table: make(map[string]map[string]int), said: make(map[string]string)}
	files, err := os.ReadDir(img.dir)
	if err != nil {
		t.Fatal(err)
	}
	var cases []damage
	for _, f := range files {
		some, err := damages(img.dir, f.Name(), perFile, rng)
		if err != nil {
			t.Fatal(err)
		}
		for _, d := range some {
			if only == nil || only(d) {
				cases = append(cases, d)
			}
		}
	}
	s.run(cases)
	return s
}

// TestDamagedBadgerIsWholeOrRefused damages each file of a store at record
// boundaries and at random offsets. MERLON_SWEEP is how many of either (default
// 1); `make crash-sweep` takes all boundaries.
func TestDamagedBadgerIsWholeOrRefused(t *testing.T) {
	t.Parallel()
	rng := rand.New(rand.NewPCG(seed(t), 1))
	perFile := number(t, "MERLON_SWEEP", 1)
	for _, img := range images(t) {
		s := sweepImage(t, plain(t), img, perFile, nil, rng)
		s.log()
		report(t, short(s.broken))
	}
}
