"""Chinese training phrasings of the embedded command set; `commands.py` explains the format."""

from __future__ import annotations

INTENTS = """
@alarm_set
train !定一个{time}的闹钟 | !{time}叫我起床 | !设一个{time}的闹钟 | 我要{time}起床
  | !新建{time}的闹钟 | !让闹钟在{time}响 | !加个{time}的闹铃 | 明天{time}要早起，叫醒我
  | !打开{time}的闹钟 | 我不能睡过{time}
@alarm_cancel
train !取消闹钟 | !把闹钟都删掉 | !关掉{time}的闹钟 | !删除{time}的闹钟 | 明天不用叫我起床
  | 不要闹钟了 | !停用起床闹钟 | {time}的闹钟不需要了 | !去掉闹铃 | 明天休息，别叫醒我
@timer_start
train !倒计时{duration} | !设一个{duration}的计时器 | !开始{duration}倒计时 | !计时{duration}
  | 我要一个{duration}的计时器 | {duration}后提示我时间到 | !启动计时器，{duration}
  | !定时{duration} | !给煮蛋计时{duration}
@timer_check
train 计时器还剩多少时间 | 倒计时还有多久 | !看看计时器 | 还剩几分钟 | 计时器还在走吗
  | !显示剩余时间 | 计时什么时候结束 | 倒计时到哪了 | !查一下计时器
@call_start
train !给{person}打电话 | !打电话给{person} | !拨打{person}的电话 | !呼叫{person}
  | 我要和{person}通话 | !拨通{person} | !跟{person}视频通话 | !打给{person}
  | 我想跟{person}在电话里聊聊 | !联系一下{person}，打他手机
@call_decline
train !挂断电话 | !拒接 | !结束通话 | 不接这个电话 | !拒绝来电 | !忽略来电 | 我现在不方便接电话
  | !挂了 | 别接 | !停止通话
@message_send
train !给{person}发短信说{message} | !告诉{person}{message} | !发消息给{person}，{message}
  | !给{person}发条信息，{message} | !跟{person}说{message} | !回复{person}，{message}
  | !发短信告诉{person}{message} | !写给{person}，{message} | 我想发信息给{person}，内容是{message}
@message_read
train !读一下我的短信 | 有新消息吗 | !念一下{person}的短信 | {person}给我发了什么 | 有没有未读消息
  | !看看最新的信息 | !打开{person}发来的消息 | {person}给我发消息了吗 | !播报未读短信
  | {person}说了什么，读一下
@navigate
train !导航到{place} | 去{place}怎么走 | !带我去{place} | !找一条去{place}的路线
  | !开始导航，去{place} | {place}的路线 | 我要开车去{place} | !给我指去{place}的路 | 怎么去{place}
  | !步行导航去{place}
@traffic_check
train 去{place}的路上堵不堵 | 开车到{place}要多久 | 路况怎么样 | !查一下路况
  | 去{place}的路上有事故吗 | 现在路上车多吗 | {place}附近堵车吗 | 到{place}要开几分钟
  | !播报交通情况
@taxi_book
train !叫一辆车去{place} | !打车去{place} | !叫个出租车 | !叫个滴滴去{place} | 我要打的去{place}
  | !约一辆去{place}的车 | !预约出租车去{place} | 我需要一辆车送我去{place}
  | !找个司机送我去{place}
@music_play
train !播放{song} | !放一首{song} | 我想听{song} | !来一首{song} | !放点音乐，{song} | !听{song}
  | !打开音乐放{song} | !唱{song}给我听 | !把{song}加到播放队列
@music_pause
train !暂停音乐 | !停止播放 | !别放了 | !暂停播放 | !把音乐关掉 | !停一下歌 | !先暂停 | 不听了
  | !关掉歌曲
@music_next
train !下一首 | !换一首歌 | !跳过这首歌 | !切歌 | !播放下一首 | 这首不好听，换一首 | !放下一个曲子
  | 不喜欢这首，跳过
@volume_up
train !调高音量 | !声音大一点 | !把音量调大 | !增大音量 | 声音太小了 | 我听不见 | !音量加大
  | !大声点 | 音量太低了
@volume_down
train !调低音量 | !声音小一点 | !把音量调小 | !减小音量 | 声音太大了 | 太吵了，轻一点 | !音量减小
  | !小声点 | 音量太高了
@dnd_on
train !打开勿扰模式 | !开启免打扰 | !手机静音 | !屏蔽所有通知 | 别打扰我 | !{duration}内不要通知我
  | !切换到静音模式 | 我要专心，不要弹通知 | !关闭消息提醒
@dnd_off
train !关闭勿扰模式 | !取消免打扰 | !解除静音 | !恢复通知 | 可以打扰我了 | !重新打开消息提醒
  | !退出静音模式 | !结束勿扰 | 可以给我弹通知了
@weather
train {city}天气怎么样 | {city}会下雨吗 | {day}天气如何 | {city}{day}的天气预报 | {city}热不热
  | {day}会下雪吗 | 外面多少度 | {day}要带伞吗 | {city}风大吗 | !查一下{city}的天气
  | {day}会不会降温
@wifi_on
train !打开wifi | !开启无线网络 | !连接wifi | !打开无线网 | 我要用wifi | !把wifi开开
  | !连上家里的wifi | !启用wifi
@wifi_off
train !关闭wifi | !关掉无线网络 | !断开wifi | !关无线网 | 不用wifi了 | !把wifi关上
  | !断开家里的wifi | !停用wifi
@bluetooth_on
train !打开蓝牙 | !开启蓝牙 | !连接蓝牙耳机 | !配对新设备 | 我要用蓝牙 | !连上我的耳机
  | !连接蓝牙音箱 | !启用蓝牙
@bluetooth_off
train !关闭蓝牙 | !关掉蓝牙 | !断开蓝牙耳机 | !取消设备配对 | 不用蓝牙了 | !断开我的耳机
  | !断开蓝牙音箱 | !停用蓝牙
@brightness_up
train !调高亮度 | !屏幕亮一点 | !把屏幕调亮 | !增加亮度 | 屏幕太暗了 | 我看不清屏幕 | !亮度调到最大
  | !提高屏幕亮度
@brightness_down
train !调低亮度 | !屏幕暗一点 | !把屏幕调暗 | !降低亮度 | 屏幕太亮了 | 屏幕刺眼 | !亮度调到最小
  | !减小屏幕亮度
@flashlight_on
train !打开手电筒 | !开手电 | !打开闪光灯照明 | 我需要手电筒 | !用手机照亮 | 太黑了，给点光
  | !开启手电筒 | !点亮手电
@flashlight_off
train !关闭手电筒 | !关手电 | !关掉闪光灯照明 | 不需要手电筒了 | 不用照亮了 | !熄灭手电筒
  | 够亮了，手电关掉 | !停用手电
@photo_take
train !拍张照片 | !拍照 | !自拍一张 | !给{person}拍张照 | !用前置摄像头拍照 | 我想拍照
  | !打开相机拍一张 | !照张相 | !拍下这个
@photos_show
train !看看我的照片 | !打开相册 | !找{person}的照片 | !显示在{city}拍的照片 | 我想看照片
  | !翻一下和{person}的合影 | 在{city}的相片在哪 | !浏览图库
@video_record
train !录一段视频 | !开始录像 | !拍视频 | !给{person}录个像 | !打开摄像机 | 我想录视频
  | !拍一段短片 | !开始摄像 | !录下{person}
@screenshot
train !截屏 | !截个图 | !截取屏幕 | !把屏幕保存下来 | !屏幕截图 | !保存当前画面 | 我要截图
  | !把这个页面截下来
@calendar_add
train !{day}安排{event} | !在日历里加上{day}{event} | !新建日程，{day}{event}
  | {day}我有{event}，记到日历 | !把{event}排在{day} | !{day}添加一个{event} | !预定{day}的{event}
  | !日程表加上{event}，{day}
@calendar_query
train {day}有什么安排 | {day}有会吗 | !看看{day}的日程 | 什么时候{event} | {day}我有空吗
  | !查一下{day}的日历 | !读一下{day}的行程 | {day}有事吗 | 我{day}有哪些约会
@reminder_add
train !提醒我{task} | !{time}提醒我{task} | 别让我忘了{task} | 我得记得{task} | !设个提醒，{task}
  | !添加提醒，{time}{task} | 到{time}叫我{task} | 我不能忘记{task}，提醒一下
  | !创建一个{task}的提醒
@note_add
train !记一下，{note} | !写个备忘，{note} | !记笔记，{note} | !新建便签，{note} | !写下来，{note}
  | !在备忘录里加上{note} | !保存一条笔记，{note} | !记在本子上，{note} | 新笔记，{note}
@translate
train !把{phrase}翻译成{language} | {phrase}用{language}怎么说 | {language}的{phrase}怎么讲
  | !翻译{phrase}到{language} | !用{language}说{phrase} | {phrase}的{language}是什么
  | !给我{phrase}的{language}翻译 | {language}里{phrase}怎么说
@calculate
train {expression}等于多少 | !计算{expression} | !算一下{expression} | {expression}是多少
  | {expression}的结果 | !打开计算器算{expression} | !求{expression} | {expression}得几
  | !告诉我{expression}的答案
@lights_on
train !打开{room}的灯 | !开{room}灯 | !把{room}的灯打开 | !点亮{room} | {room}太黑了 | {room}开灯
  | {room}需要光 | !让{room}亮起来
@lights_off
train !关掉{room}的灯 | !关{room}灯 | !把{room}的灯关了 | !熄灭{room}的灯 | {room}太亮了
  | {room}关灯 | {room}不需要灯 | !让{room}暗下来
@thermostat_set
train !把空调设到{temperature} | !温度调到{temperature} | !{room}调到{temperature}
  | !暖气开到{temperature} | !把{room}的温度设成{temperature} | 我想让{room}保持{temperature}
  | 空调{temperature} | !恒温器设{temperature}
@app_open
train !打开{app} | !启动{app} | !运行{app} | !打开{app}应用 | !进入{app} | 我要用{app}
  | !切换到{app} | !开{app}
@app_close
train !关闭{app} | !退出{app} | !把{app}关掉 | !关闭{app}应用 | !结束{app} | 不用{app}了
  | !强制停止{app} | !关{app}
@app_install
train !安装{app} | !下载{app} | !从应用商店下载{app} | !装一个{app} | 我想下载{app}
  | !在手机上装{app} | !去商店安装{app} | !下个{app}
@app_uninstall
train !卸载{app} | !删除{app} | !从手机上删掉{app} | !把{app}卸了 | 不想要{app}了 | !移除{app}应用
  | 从来不用{app}，删了吧 | !删掉{app}这个软件
@web_search
train !搜索{topic} | !搜一下{topic} | !百度一下{topic} | !上网查{topic} | !在网上找{topic}的资料
  | !查{topic}的信息 | !用浏览器搜{topic} | !网上搜{topic}
@email_send
train !给{person}发邮件说{subject} | !写封邮件给{person}，关于{subject}
  | !发一封关于{subject}的邮件给{person} | !新建邮件给{person}，主题{subject}
  | 我要给{person}发电子邮件，内容是{subject} | !起草给{person}的邮件，{subject}
  | !用邮箱给{person}发{subject}
@pay
train !给{person}转账{amount} | !转{amount}给{person} | !付给{person}{amount}
  | 我欠{person}{amount}，还给他 | !支付{person}{amount} | !给{person}发{amount}红包
  | !还{person}{amount} | !向{person}付款{amount}
@food_order
train !点一份{dish} | 我想吃{dish} | !叫{dish}外卖 | !订{dish} | 我饿了，点{dish} | !外卖点{dish}
  | 晚饭要{dish}，下单 | !买{dish}送到家
@battery_check
train 还剩多少电 | 电量多少 | !查看电量 | 电池还有多少 | 手机有电吗 | !显示电池状态 | 要不要充电
  | 电量百分比是多少 | 电池满了吗
@contact_add
train !把{person}加到通讯录 | !保存{person}的号码 | !新建联系人{person} | !添加联系人{person}
  | !把这个号码存为{person} | !存一下{person}的电话 | !记录{person}的手机号 | 新联系人，{person}
@podcast_play
train !播放播客{podcast} | !放最新一期{podcast} | !听{podcast}播客 | !继续播放{podcast}的上一期
  | 我想听{podcast}的节目 | {podcast}更新了吗，放给我听 | !打开{podcast}这个播客
  | !播{podcast}的最新一集
@news
train 有什么新闻 | !播报新闻 | !今天的头条 | {topic}的新闻 | 有没有{topic}的最新消息
  | 世界上发生了什么 | !看看{topic}的最新报道 | !读一下今天的新闻 | 今日要闻
@stock_price
train {company}股价多少 | {company}的股票怎么样 | !查{company}股票 | {company}一股多少钱
  | {company}今天涨了吗 | !看看{company}的行情 | !告诉我{company}的股价 | {company}股票跌了没有
@sports_score
train {team}赢了吗 | {team}比分多少 | {team}的比赛谁赢了 | {team}昨晚打得怎么样 | !查{team}的赛果
  | {team}领先吗 | {team}下一场什么时候 | !告诉我{team}的比分
@phone_find
train 我的手机在哪 | !找手机 | !让我的手机响起来 | 我找不到手机了 | !定位我的手机 | 手机丢了
  | !找找我的手机 | 我把手机弄丢了
@airplane_on
train !打开飞行模式 | !开启飞行模式 | !切换到飞行模式 | 我要登机了，飞行模式 | !把手机调成飞行模式
  | !启用飞行模式 | 飞行模式打开 | 飞机要起飞了，开飞行模式
@hotel_book
train !订{city}的酒店 | !在{city}找个酒店 | 我需要{city}的酒店房间 | !预订{city}{day}的房间
  | {city}{day}的酒店 | !找{city}便宜的宾馆 | !在{city}订两晚 | !订一间{day}的房，在{city}
@oos
train 你好吗 | 讲个笑话 | 法国的首都是哪里 | 蒙娜丽莎是谁画的 | 天为什么是蓝的 | 你喜欢我吗
  | 人生的意义是什么 | 唱首摇篮曲 | 给我做个三明治 | 去洗车 | 你几岁了 | 你是机器人吗 | 叫我帅哥
  | 摆好餐桌 | 陪我下棋 | 第一个登上月球的人是谁 | 你叫什么名字 | 好无聊 | 我爱你 | 讲个故事
  | 怎么减肥 | {city}有多少人 | {city}有什么历史 | 谁创办了{company} | 你觉得{company}怎么样
  | 我该和{person}结婚吗 | {person}生我的气吗 | 把窗户给狗打开 | {dish}怎么做 | {dish}热量高吗
  | 写一首关于{topic}的诗 | {topic}有什么用 | 给孩子解释{topic} | {topic}是谁发明的 | 叠衣服
  | 带{person}去月球 | 你真笨 | 再见 | 让时间停下来 | 把{person}变成青蛙 | {person}为什么离开我
  | 蜘蛛有几条腿 | 取消冬天 | {city}说什么方言 | {song}好听吗 | {dish}是哪里的特产
"""
