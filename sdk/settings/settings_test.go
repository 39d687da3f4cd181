// Which source wins, what is refused, and what a table has to hold.

package settings

import (
	"errors"
	"flag"
	"io"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
	"time"
)

type config struct {
	Name    string        `yaml:"name"`
	Packed  bool          `yaml:"packed"`
	Size    int           `yaml:"size"`
	Wait    time.Duration `yaml:"wait"`
	UID     uint32        `yaml:"uid"`
	UIDs    []uint32      `yaml:"uids"`
	Headers []string      `yaml:"headers"`
	Since   time.Time     `yaml:"since"` // reads itself from text
	Special string        `yaml:"special"`
	Token   string        `yaml:"token"`
	Rules   []struct{}    `yaml:"rules"`
	Own     int           `yaml:"-"`
}

func testProgram() *Program[config] {
	p := &Program[config]{Name: "prog", Env: "PROG_", About: "prog is for tests.\n"}
	for _, key := range []string{"name", "size", "wait", "uid", "uids", "headers", "since"} {
		p.Settings = append(p.Settings, Setting[config]{Key: key, Usage: "what " + key + " is"})
	}
	p.Settings = append(
		p.Settings,
		Setting[config]{Key: "packed", Usage: "whether", Switch: true},
		Setting[config]{Key: "special", Usage: "something else", Join: "+", Set: func(c *config, text string) error { c.Special = "<" + text + ">"; return nil }},
		Setting[config]{Key: "token", Secret: true},
	)
	return p
}

func read(t *testing.T, yaml string, env map[string]string, args ...string) (config, Line, error) {
	t.Helper()
	if yaml != "" {
		file := filepath.Join(t.TempDir(), "c.yaml")
		if err := os.WriteFile(file, []byte(yaml), 0o600); err != nil {
			t.Fatal(err)
		}
		args = append([]string{"-config", file}, args...)
	}
	var c config
	line, err := testProgram().Read(&c, args, func(key string) string { return env[key] }, io.Discard)
	return c, line, err
}

func TestFlagsWinOverEnvironmentOverFile(t *testing.T) {
	env := map[string]string{"PROG_NAME": "env", "PROG_SIZE": "2", "PROG_TOKEN": "secret", "PROG_UIDS": "7, 8"}
	got, line, err := read(t, "name: file\nsize: 1\nwait: 1s\nheaders: [a]\nrules: []\n", env,
		"-name", "flag", "-packed", "-headers", "x, y", "-uid", "9", "-since", "2026-11-26T00:00:00Z", "-special", "s", "-validate", "rest")
	if err != nil {
		t.Fatal(err)
	}
	want := config{
		Name: "flag", Size: 2, Wait: time.Second, Packed: true, UID: 9, UIDs: []uint32{7, 8}, Headers: []string{"x", "y"},
		Since: time.Date(2026, 11, 26, 0, 0, 0, 0, time.UTC), Special: "<s>", Token: "secret", Rules: []struct{}{},
	}
	if !reflect.DeepEqual(got, want) {
		t.Errorf("configuration = %+v; want %+v", got, want)
	}
	if !line.ValidateOnly || len(line.Args) != 1 || testProgram().Unexpected(line) == nil {
		t.Errorf("line = %+v", line)
	}
}

func TestNothingGivenForAListIsAnEmptyOne(t *testing.T) {
	if c, _, err := read(t, "headers: [a]\n", nil, "-headers", ""); err != nil || c.Headers == nil || len(c.Headers) != 0 {
		t.Errorf("headers = %#v, %v; want an empty list, which is not nil", c.Headers, err)
	}
}

func TestFlagGivenTwice(t *testing.T) {
	c, _, err := read(t, "", map[string]string{"PROG_SPECIAL": "env"}, "-name", "a", "-special", "a", "-special", "b", "-name", "b")
	if err != nil || c.Name != "b" || c.Special != "<a+b>" {
		t.Errorf("%+v, %v; want the last name, and both specials", c, err)
	}
}

func TestMistakesNameTheirSource(t *testing.T) {
	for want, tt := range map[string]struct {
		env  map[string]string
		args []string
	}{
		`-size: "many" is not a number`:          {args: []string{"-size", "many"}},
		`PROG_SIZE: "many" is not a number`:      {env: map[string]string{"PROG_SIZE": "many"}},
		`-wait: "5" is not a duration`:           {args: []string{"-wait", "5"}},
		`-uids: "root" is not a uid`:             {args: []string{"-uids", "1,root"}},
		`-uid: "4294967296" is not a uid`:        {args: []string{"-uid", "4294967296"}},
		`PROG_PACKED: "so" is neither true nor`:  {env: map[string]string{"PROG_PACKED": "so"}},
		`-since: parsing time`:                   {args: []string{"-since", "now"}},
		`flag provided but not defined: -token`:  {args: []string{"-token", "x"}}, // readable in the list of processes
		`read the configuration: open /nowhere:`: {args: []string{"-config", "/nowhere"}},
	} {
		_, _, err := read(t, "", tt.env, tt.args...)
		if err == nil || !strings.HasPrefix(err.Error(), want) || !strings.Contains(Hint(err), "prog -h") {
			t.Errorf("error = %v, hint %q; want %q and a hint", err, Hint(err), want)
		}
	}
	if _, _, err := read(t, "nme: x\n", nil); err == nil || !strings.Contains(err.Error(), `c.yaml:1:1`) || !strings.Contains(err.Error(), `"name"`) {
		t.Errorf("an unknown key: %v; want its place and the right one", err)
	}
}

func TestHelpShowsEverySettingButSecrets(t *testing.T) {
	var out strings.Builder
	if _, err := testProgram().Read(new(config), []string{"-h"}, func(string) string { return "" }, &out); !errors.Is(err, flag.ErrHelp) {
		t.Fatalf("-h: %v; want flag.ErrHelp", err)
	}
	for _, s := range testProgram().Settings {
		if shown := strings.Contains(out.String(), "\n  "+s.flag()); shown == s.Secret {
			t.Errorf("%s is shown: %t", s.Key, shown)
		}
	}
	if !strings.HasPrefix(out.String(), "prog is for tests.\n") || !strings.Contains(out.String(), "PROG_NAME") {
		t.Errorf("help = %s", out.String())
	}
}

func TestCheckFindsWhatDoesNotFit(t *testing.T) {
	if err := testProgram().Check("rules"); err != nil {
		t.Errorf("a table that fits: %v", err)
	}
	for want, change := range map[string]func(p *Program[config]){
		"name: is to be a setting":     func(p *Program[config]) { p.Settings = p.Settings[1:] },
		"name: has no usage":           func(p *Program[config]) { p.Settings[0].Usage = "" },
		"nme: is no field":             func(p *Program[config]) { p.Settings[0].Key = "nme" },
		"rules: is to be a setting":    func(p *Program[config]) { p.Settings = append(p.Settings, Setting[config]{Key: "rules", Usage: "x"}) },
		"has to say by Set how it is ": func(p *Program[config]) { p.Settings = append(p.Settings, Setting[config]{Key: "rules", Usage: "x"}) },
	} {
		p := testProgram()
		change(p)
		if err := p.Check("rules"); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("Check() = %v; want %q", err, want)
		}
	}
}

func TestNewLogger(t *testing.T) {
	for _, tt := range []struct{ level, format, field string }{
		{"info", "text", ""},
		{"debug", "json", ""},
		{"loud", "text", "log_level"},
		{"info+1", "text", "log_level"},
		{"info", "xml", "log_format"},
	} {
		_, err := NewLogger(io.Discard, tt.level, tt.format)
		if e, ok := errors.AsType[*InvalidError](err); ok != (tt.field != "") || ok && e.Field != tt.field {
			t.Errorf("NewLogger(%s, %s) = %v; want an error about %q", tt.level, tt.format, err, tt.field)
		}
	}
}
